"""compressed-tensors of eight bits, whose engines round the inputs of linears too."""

from __future__ import annotations

import pytest
import torch

from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.methods import fp8, rtn
from quantkit.methods.fp8 import Fp8Scheme, Fp8Tensor
from quantkit.methods.grids import Grid, QuantizedTensor
from tests.helpers.stored import stored

COMPRESSED = CompressedTensorsFormat()


CPU, BF16 = torch.device("cpu"), torch.bfloat16


INT8 = Grid(8, -1, True, rounds_inputs=True)


ROUNDING_INPUTS = [INT8, Fp8Scheme()]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed(
    scheme: Grid | Fp8Scheme, weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[QuantizedTensor | Fp8Tensor, dict[str, torch.Tensor]]:
    tensor = rtn.quantize(weight, scheme) if isinstance(scheme, Grid) else fp8.quantize(weight)
    return tensor, COMPRESSED.pack(tensor, dtype)


@pytest.mark.parametrize("scheme", ROUNDING_INPUTS, ids=str)
def test_round_trip_and_size(scheme: Fp8Scheme | Grid) -> None:
    tensor, parts = packed(scheme, random(48, 96))
    config = COMPRESSED.config(scheme, {"m": scheme}, ["lm_head"], BF16)
    back = COMPRESSED.unpack(stored(parts, config))
    assert torch.equal(back.dequantize(), tensor.dequantize())
    assert parts["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
    assert parts["weight_scale"].shape == (48, 1)
    assert sum(t.nbytes for t in parts.values()) == COMPRESSED.nbytes((48, 96), scheme, BF16)
    assert COMPRESSED.weight_shape(stored(parts, config)) == (48, 96)


@pytest.mark.parametrize("scheme", ROUNDING_INPUTS, ids=str)
def test_its_own_library_reads_it(scheme: Fp8Scheme | Grid) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import (
        FloatQuantizationCompressor,
        IntQuantizationCompressor,
    )
    from compressed_tensors.quantization import QuantizationConfig

    config = COMPRESSED.config(scheme, {"m": scheme}, ["lm_head"], BF16)
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    codec = IntQuantizationCompressor if scheme == INT8 else FloatQuantizationCompressor
    tensor, parts = packed(scheme, random(48, 96), torch.float32)
    assert torch.equal(codec.decompress(parts, group)["weight"], tensor.dequantize())
    assert group.input_activations.dynamic and group.input_activations.strategy == "token"


def test_inputs_of_a_fixed_scale_are_rounded_by_the_one_stored() -> None:
    config = COMPRESSED.config(INT8, {"m": INT8}, [], BF16)
    config["config_groups"]["group_0"]["input_activations"] |= {
        "dynamic": False,
        "strategy": "tensor",
    }
    rounding = COMPRESSED.input_rounding(stored({"input_scale": torch.tensor(0.5)}, config))
    assert rounding is not None
    assert rounding(torch.tensor([[0.6, -0.2, 1000.0]])).tolist() == [[0.5, 0.0, 63.5]]
