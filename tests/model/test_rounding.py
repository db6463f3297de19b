"""Linears that round their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from quantkit.checkpoint.reader import Checkpoint
from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.methods.fp8 import Fp8Scheme
from quantkit.methods.inputs import InputRounding, round_fp8
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from tests.helpers.stored import stored
from tests.helpers.tiny import build

COMPRESSED = CompressedTensorsFormat()


CPU, BF16 = torch.device("cpu"), torch.bfloat16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_judging_rounds_what_engines_round(tmp_path: Path) -> None:
    """The streamed model's linears see rounded inputs, and only while its weights are in place."""
    directory = build("llama", tmp_path / "tiny", dtype=torch.float32)
    scheme = Fp8Scheme()
    source = Checkpoint(directory)
    name = "model.layers.1.mlp.down_proj"
    x = random(2, 3, 96)

    class Source:
        def keys(self) -> Iterable[str]:
            return source.keys()

        def read(self, key: str) -> torch.Tensor:
            return source.read(key)

        def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
            return source.read_rows(key, start, stop)

        def input_rounding(self, key: str) -> InputRounding | None:
            config = COMPRESSED.config(scheme, {name: scheme}, [], BF16)
            config["config_groups"]["group_0"]["targets"] = [name]
            module = key.removesuffix(".weight")
            linear = stored({}, config, module)
            return COMPRESSED.input_rounding(linear) if module == name else None

    skeleton = Skeleton(source)
    stream = Stream(skeleton, Source(), CPU)
    weight = source.read(f"{name}.weight")
    with stream.block(1) as block, torch.inference_mode():
        assert torch.equal(block.get_submodule("mlp.down_proj")(x), round_fp8(x) @ weight.t())
        gate = source.read("model.layers.1.mlp.gate_proj.weight")
        y = random(2, 64)
        untouched = torch.nn.functional.linear(y, gate)
        assert torch.equal(block.get_submodule("mlp.gate_proj")(y), untouched)
    assert not skeleton.layers[1].get_submodule("mlp.down_proj")._forward_pre_hooks
