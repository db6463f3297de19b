"""The kernel that visits a panel of columns: it chooses the codes that the CPU chooses."""

from __future__ import annotations

import pytest
import torch

from quantkit.calibration.statistics import Drift, Gram
from quantkit.methods.cholesky import on_device_
from quantkit.methods.gptq import feedback
from quantkit.methods.gptq import method as gptq
from quantkit.methods.gptq.feedback import GptqSettings, RoundedRows
from quantkit.methods.gptq.method import Readers
from quantkit.methods.grids import Grid
from tests.helpers.kernels import Launches, counted, kernels


def inputs(columns: int, kind: str, tokens: int = 600) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=generator)
    if kind == "correlated":
        x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5
        x[:, :3] *= 20
    return x.to(torch.bfloat16)


def weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).mul_(0.05).to(torch.bfloat16)


def both(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    grids: list[Grid],
    settings: GptqSettings,
    read: torch.Tensor | None = None,
) -> tuple[list[RoundedRows], list[RoundedRows]]:
    """The weights as they are quantized by columns on the CPU, and by the kernel.

    read: what the quantized model reads, where inputs have drifted.
    """

    def quantize(device: torch.device) -> list[RoundedRows]:
        original = x.to(device)
        measured = original if read is None else read.to(device)
        moment, drift = Gram(x.shape[1], device), None
        moment.add(measured)
        if read is not None:
            sums = Drift(x.shape[1], device)
            sums.add(original, measured)
            drift = sums.matrix()
        readers = Readers(moment, [w.to(device) for w in weights], grids, drift)
        return gptq.quantize_readers([readers], settings)[0]

    by_columns = quantize(torch.device("cpu"))
    with kernels() as device:
        return by_columns, quantize(device)


def agree(one: RoundedRows, other: RoundedRows) -> None:
    codes, scales = other.tensor.codes.cpu(), other.tensor.scales.cpu()
    # Sums in another order are rounded otherwise, which moves codes on an edge, and what follows.
    assert (one.tensor.codes == codes).float().mean() > 0.99
    assert (one.tensor.scales == scales).float().mean() > 0.99
    assert other.loss == pytest.approx(one.loss, rel=5e-3)


@pytest.mark.parametrize("kind", ["random", "correlated"])
@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [(2, False, 32), (3, True, 32), (4, True, 96), (4, False, -1), (5, False, 32), (8, True, -1)],
)
def test_codes_are_those_of_the_cpu(kind: str, bits: int, symmetric: bool, group: int) -> None:
    one, other = both(
        inputs(192, kind), [weight(20, 192)], [Grid(bits, group, symmetric)], GptqSettings()
    )
    agree(one[0], other[0])


@pytest.mark.parametrize(
    ("rows", "columns", "block"), [(1, 8, 128), (33, 136, 128), (70, 160, 512), (5, 150, 7)]
)
def test_odd_sizes(rows: int, columns: int, block: int) -> None:
    settings = GptqSettings(block_size=block)
    grid = Grid(4, -1 if columns % 8 else 8, True)
    one, other = both(inputs(columns, "correlated"), [weight(rows, columns)], [grid], settings)
    agree(one[0], other[0])


def test_weights_on_two_grids_with_drifted_inputs() -> None:
    x = inputs(128, "correlated")
    read = (x.float() + 0.1 * inputs(128, "random").float()).to(torch.bfloat16)
    grids = [Grid(4, 32, True), Grid(3, 32, False), Grid(4, 32, True)]
    weights = [weight(rows, 128) for rows in (16, 40, 24)]
    for one, other in zip(*both(x, weights, grids, GptqSettings(), read), strict=True):
        agree(one, other)


def test_more_damping_and_no_factor_at_all() -> None:
    x = inputs(64, "random", tokens=8).repeat(1, 2)  # of rank 8
    settings = GptqSettings(damping=1e-9)
    one, other = both(x, [weight(9, 128)], [Grid(4, 32, True)], settings)
    assert one[0].damping == other[0].damping
    assert one[0].damping is not None and one[0].damping > 1e-9
    nothing = torch.full_like(x, torch.nan)
    one, other = both(nothing, [weight(9, 128)], [Grid(4, 32, True)], settings)
    assert one[0].damping is None and other[0].damping is None
    assert torch.equal(one[0].tensor.codes, other[0].tensor.codes.cpu())


def launches(columns: int, bits: int = 4) -> Launches:
    """Of a block's four inputs, as a Llama has them, of which the kernel isn't run."""
    from quantkit.methods.gptq import kernel

    moments = [Gram(columns, torch.device("cpu")) for _ in range(4)]
    x = inputs(columns, "random", tokens=2 * columns)
    for moment in moments:
        moment.add(x)
    weights = [[weight(rows, columns) for rows in outs] for outs in ((9, 3, 3), (9,), (8, 8), (9,))]
    readers = [
        Readers(moment, of_one, [Grid(bits, 128, True)] * len(of_one))
        for moment, of_one in zip(moments, weights, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patch, kernels():
        patch.setattr(feedback, "cholesky_", lambda matrix, threads: on_device_(matrix))
        with counted(kernel, "visit_panel") as found:
            gptq.quantize_readers(readers, GptqSettings())
    return found


def test_launches_grow_with_panels_and_nothing_is_waited_for() -> None:
    few, many = launches(256), launches(512)
    assert few.waits == 0 and many.waits == 0
    assert few.events.count("kernel") == 4 * 2 and many.events.count("kernel") == 4 * 4
    # 4 inputs, of 2 panels more.
    a_panel = (many.count - few.count) / (4 * 2)
    fixed = few.count - 4 * 2 * a_panel
    # A Llama block of width 4096, whose down projection reads 14336.
    assert fixed + a_panel * (3 * 4096 + 14336) / 128 < 3000


def test_late_scales_are_waited_for_once() -> None:
    assert launches(256, bits=3).waits == 1
