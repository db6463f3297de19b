"""Names of models: directories, hub ids, and the bundled demo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.base.errors import InputError
from quantkit.checkpoint.source import locate_model, model_name


def test_models_are_named_by_directory_or_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (locate_model("demo") / "config.json").is_file()
    assert locate_model(str(tmp_path)) == tmp_path
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate_model("./demo") == Path("demo") and locate_model("demo") != Path("demo")
    assert model_name("owner/name@main") == "name" and model_name("demo") == "demo"
    assert model_name(str(tmp_path / "demo")) == "demo"
    with pytest.raises(InputError, match="no such directory"):
        locate_model("./nowhere")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="is a file"):
        locate_model(str(file))
