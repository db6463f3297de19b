"""The 4-bit linears on torch's kernel for CUDA, whose layouts are written out here for the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.base.errors import MachineError
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines import int4
from quantkit.formats.packed import PackedCheckpoint
from quantkit.methods.grids import Grid, QuantizedTensor


def convert(pairs: Tensor, tiles: int) -> Tensor:
    """``aten::_convert_weight_to_int4pack`` of int4mm.cu: (out/8, in/16/tiles, 32, tiles/2)."""
    assert pairs.dtype == torch.uint8 and pairs.is_contiguous() and tiles in (2, 4, 8)
    rows, bytes_ = pairs.shape
    assert rows % 8 == 0 and 2 * bytes_ % (16 * tiles) == 0
    wide = torch.empty(rows // 8, 2 * bytes_ // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for lane in range(32):
        for inner in range(0, tiles, 2):
            starts = (torch.arange(wide.shape[1]) * tiles + inner) * 8 + lane % 4
            places = [starts, starts + 4, starts + 8, starts + 12]
            word = torch.zeros(wide.shape[:2], dtype=torch.int64)
            for number, place in enumerate(places):
                byte = pairs[lane // 4 :: 8][:, place].long()
                word |= (byte >> 4) << 4 * number | (byte & 15) << 16 + 4 * number
            wide[:, :, lane, inner // 2] = word
    return wide.to(torch.int32)


def multiply(x: Tensor, packed: Tensor, group: int, both: Tensor) -> Tensor:
    """``aten::_weight_int4pack_mm``: the lower half of a word has even columns, the upper odd."""
    assert x.dtype == torch.bfloat16 and x.is_contiguous() and both.dtype == torch.bfloat16
    assert packed.dim() == 4 and packed.shape[2] == 32 and group in (32, 64, 128, 256)
    outer, inner, _, half = packed.shape
    rows, columns = outer * 8, inner * half * 32
    assert both.shape == (columns // group, rows, 2) and x.shape[1] == columns
    codes = torch.empty(rows, columns)
    words = packed.long() & 0xFFFFFFFF
    for lane in range(32):
        for pair in range(half):
            starts = (torch.arange(inner) * half + pair) * 32 + lane % 4 * 2
            for number, offset in enumerate((0, 8, 16, 24)):
                word = words[:, :, lane, pair]
                codes[lane // 4 :: 8, starts + offset] = (word >> 4 * number & 15).float()
                codes[lane // 4 :: 8, starts + offset + 1] = (word >> 16 + 4 * number & 15).float()
    scales, offsets = (both[..., n].float().t().repeat_interleave(group, 1) for n in (0, 1))
    return (x.float() @ ((codes - 8) * scales + offsets).t()).bfloat16()


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Linears for the CPU on the kernel for CUDA, which has no code for the CPU but this."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_convert_weight_to_int4pack", convert, "CPU")
    library.impl("_weight_int4pack_mm", multiply, "CPU")
    monkeypatch.setitem(int4._KERNELS, "cpu", int4._for_cuda)
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("columns", "group", "symmetric", "permuted"),
    [
        (128, 128, True, False),
        (96, 32, False, False),
        (192, 64, False, True),
        (512, 256, True, True),
    ],
)
def test_the_kernel_for_cuda_computes_what_the_codes_mean(
    on_cuda: None, columns: int, group: int, symmetric: bool, permuted: bool
) -> None:
    seeded = torch.Generator().manual_seed(columns)
    grid = Grid(bits=4, group_size=group, symmetric=symmetric)
    groups = columns // group
    tensor = QuantizedTensor(
        grid,
        torch.randint(0, 16, (32, columns), generator=seeded, dtype=torch.uint8),
        torch.rand(32, groups, generator=seeded).bfloat16().float() / 16,
        torch.randint(0, 16, (32, groups), generator=seeded, dtype=torch.uint8),
        (torch.arange(columns) % groups) if permuted else None,
    )
    bias = torch.randn(32, generator=seeded).bfloat16()
    linear = int4.Int4Linear(tensor, bias, torch.bfloat16)
    assert linear.weight.dtype == torch.int32 and linear.weight.shape[0] == 4
    x = torch.randn(2, 3, columns, generator=seeded).bfloat16()
    expected = x.float() @ tensor.dequantize().t() + bias.float()
    error = (linear(x).float() - expected).norm() / expected.norm()
    assert linear(x).shape == (2, 3, 32) and error < 0.01


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.bfloat16, "compute capability 8.0"),
        ((9, 0), torch.float16, "computes in bfloat16 there, and the model in float16"),
    ],
)
def test_what_no_engine_runs_on_cuda_says_so(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(MachineError, match=f"no engine of ours runs it on cuda: .*{reason}"):
        int4._check_kernel(torch.device("cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["awq-w4-g128", "gptq-w4-g128"])
def test_a_gpu_computes_what_was_judged(tmp_path: Path, name: str) -> None:
    quantkit.quantize(name, model="demo", out=tmp_path / name, device="cuda", cache=False)
    source = PackedCheckpoint(Checkpoint(tmp_path / name))
    model, engine = int4.load(source, torch.device("cuda"))
    assert engine == "quantkit-int4" and model.device.type == "cuda"
    for path, linear in model.named_modules():
        if isinstance(linear, int4.Int4Linear):
            tensor = source.read_quantized(f"{path}.weight")
            assert isinstance(tensor, QuantizedTensor)
            x = torch.randn(3, linear.in_features).bfloat16()
            expected = x.float() @ tensor.dequantize().t()
            error = (linear(x.cuda()).float().cpu() - expected).norm() / expected.norm()
            assert error < 0.02, path
    ids = torch.tensor([[1, 2, 3, 4]])
    on_cpu, _ = int4.load(source)
    with torch.inference_mode():
        logits, expected = model(ids.cuda()).logits.float().cpu(), on_cpu(ids).logits.float()
    assert (logits - expected).norm() < 0.05 * expected.norm()
