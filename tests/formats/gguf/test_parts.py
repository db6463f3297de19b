"""A GGUF file in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.writer import write_file


def test_a_gguf_in_parts_is_one_model(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    gguf = tmp_path / "whole" / "demo.gguf"
    gguf.parent.mkdir()
    baseline = Checkpoint(demo_model())
    write_file(gguf, plan_file(baseline, "q8_0"), baseline)
    reader = library.GGUFReader(gguf)
    writer = library.GGUFWriter(tmp_path / "demo.gguf", "llama", split_max_tensors=15)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            sub = kinds[-1] if kinds[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    parts, whole = GgufWeights(tmp_path), GgufWeights(gguf)
    assert set(parts.keys()) == set(whole.keys())
    for key in whole.keys():  # noqa: SIM118 (it's no dictionary)
        assert torch.equal(parts.read(key), whole.read(key)), key
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(InputError, match="in 3 parts"):
        GgufWeights(tmp_path)
