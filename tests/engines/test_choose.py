"""What an engine needs to run an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.errors import MachineError
from quantkit.engines.choose import check_engine


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("quantkit.engines.choose.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs compressed-tensors for this format"):
        check_engine("transformers", tmp_path)
