"""The kernel for ggml's grids: it chooses the codes that the CPU chooses, and waits for nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from quantkit.base.errors import InputError
from quantkit.calibration.statistics import Drift, Gram, InputStatistics
from quantkit.methods.cholesky import on_device_
from quantkit.methods.ggml import feedback, matrices
from quantkit.methods.ggml.blocks import LAYOUTS
from quantkit.methods.ggml.feedback import (
    FEEDBACK_TYPES,
    RoundedMatrix,
    factorize_orders,
    quantize_with_feedback,
)
from quantkit.methods.grids import gram_loss
from tests.helpers.kernels import Launches, counted, kernels

pytest.importorskip("gguf")
# Their steps are floats, whose last bit moves codes: others are integers times a fixed unit.
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


def inputs(columns: int, *, heavy: bool = False, tokens: int = 600) -> Tensor:
    """Correlated inputs of uneven energy with heavy tails; ``heavy``: of which a few have most."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=generator).exp_()
    x *= torch.randn(tokens, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = x @ (mixing + torch.eye(columns))
    if heavy:
        x[:, ::17] *= 20
    return x.to(torch.bfloat16)


def weight_of(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).mul_(0.03).to(torch.bfloat16)


def both(
    x: Tensor, weight: Tensor, type: str, *, drifted: bool = False
) -> tuple[RoundedMatrix, RoundedMatrix]:
    """The weight as it is quantized by columns on the CPU, and by the kernel."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    read = (x + 0.2 * noise * x.float().std()).to(x.dtype) if drifted else x

    def quantize(device: torch.device) -> RoundedMatrix:
        moment, sums = Gram(x.shape[1], device), Drift(x.shape[1], device)
        moment.add(read.to(device))
        sums.add(x.to(device), read.to(device))
        factors = factorize_orders(moment, drift=sums.matrix() if drifted else None)
        assert factors is not None
        return quantize_with_feedback(weight.to(device), factors, type)

    by_columns = quantize(torch.device("cpu"))
    with kernels() as device:
        by_kernel = quantize(device)
    if not drifted:  # then the loss is that of other weights
        gram = x.float().t() @ x.float()
        difference = by_kernel.tensor.dequantize() - weight.float()
        assert by_kernel.loss == pytest.approx(float(gram_loss(difference, gram).sum()), rel=2e-3)
    return by_columns, by_kernel


def agree(one: RoundedMatrix, other: RoundedMatrix) -> None:
    assert other.tensor.blocks.device.type == "cpu"
    # Sums in another order are rounded otherwise, which moves codes on an edge, and what follows.
    plain = one.tensor.type in PLAIN
    assert same_codes(one, other) > (0.9 if plain else 0.99)
    assert other.loss == pytest.approx(one.loss, rel=0.02 if plain else 5e-3)


def same_codes(one: RoundedMatrix, other: RoundedMatrix) -> float:
    """The share of values that are less than half a step apart."""
    values, others = one.tensor.dequantize(), other.tensor.dequantize()
    layout = LAYOUTS[one.tensor.type]
    steps = len(layout.table) or layout.codes[1] - layout.codes[0]
    step = (values.amax(1, keepdim=True) - values.amin(1, keepdim=True)) / steps
    return float(((values - others).abs() <= step / 4).float().mean())


@pytest.mark.parametrize("type", FEEDBACK_TYPES)
def test_codes_are_those_of_the_cpu(type: str) -> None:
    """In one or two rounds, with and without drift."""
    place, plain = FEEDBACK_TYPES.index(type), type in PLAIN
    columns = 96 if plain else 256
    x = inputs(columns, heavy=plain or place % 2 == 0)
    agree(*both(x, weight_of(20, columns), type, drifted=place % 3 == 0))


@pytest.mark.parametrize(
    ("rows", "columns", "heavy"), [(1, 32, True), (33, 64, False), (5, 288, True), (7, 512, False)]
)
def test_odd_sizes(rows: int, columns: int, heavy: bool) -> None:
    agree(*both(inputs(columns, heavy=heavy), weight_of(rows, columns), "Q4_0"))


@pytest.mark.parametrize("type", ["Q5_1", "IQ4_NL"])
def test_extreme_weights(type: str) -> None:
    weight = weight_of(8, 64).float()
    weight[0] = 0
    weight[1, :32] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] *= 1e-9  # below the range of fp16 scales
    weight[5, 40] = 1e7  # above
    weight[6], weight[7] = 0.02, -0.02
    one, other = both(inputs(64), weight, type)
    values = other.tensor.dequantize()
    assert values.isfinite().all() and not values[0].any()
    assert other.loss == pytest.approx(one.loss, rel=5e-3)


@dataclass(frozen=True)
class Rows:
    """A matrix of which there are these weights. Implements ``Matrix``."""

    name: str
    weight: Tensor
    type: str = "Q4_0"

    @property
    def key(self) -> str:
        return f"model.{self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


def statistics(x: Tensor, *consumers: str) -> InputStatistics:
    moment = Gram(x.shape[1], torch.device("cpu"))
    moment.add(x)
    energy = {name: torch.tensor(2.0, dtype=torch.float64) for name in consumers}
    return InputStatistics(list(consumers), x.shape[1], moment, len(x), energy)


# Of a weight that holds infinity.
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN slice")
def test_matrices_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come out as from the CPU, by their names, whatever is quantized together."""
    x = inputs(64)
    read = [statistics(x, "q", "k", "v"), statistics(x[:, :32], "o"), statistics(x[:, :40], "no")]
    nothing = statistics(torch.zeros(8, 32), "dead")
    named = {
        "q": Rows("q", weight_of(40, 64)),
        "k": Rows("k", weight_of(9, 64), "Q8_0"),
        "v": Rows("v", weight_of(8, 64)),
        "o": Rows("o", weight_of(3, 32), "Q5_1"),
        "no": Rows("no", weight_of(3, 40)),
        "dead": Rows("dead", weight_of(3, 32)),
    }
    monkeypatch.setattr(matrices, "_ROWS", 16)
    monkeypatch.setattr(matrices, "_WEIGHTS_ON_DEVICE", 24 * 64)  # rows of q and of v, and more
    by_threads = matrices.quantize_matrices([*read, nothing], named, 0.01)
    output = matrices.quantize_output_matrix(read[0], named["q"], 0.01)
    with kernels() as device:
        if device.type == "cpu":  # where the statistics are
            on_device = matrices.quantize_matrices([*read, nothing], named, 0.01)
            assert sorted(on_device) == sorted(by_threads) == ["k", "o", "q", "v"]
            for name, linear in on_device.items():
                assert linear.tensor.shape == named[name].shape
                assert linear.report.scheme == by_threads[name].report.scheme
                expected = by_threads[name].report.error
                assert linear.report.error == pytest.approx(expected, rel=0.03)
                near = linear.tensor.dequantize() - by_threads[name].tensor.dequantize()
                assert (near.abs() < 1e-3).float().mean() > 0.9
            again = matrices.quantize_output_matrix(read[0], named["q"], 0.01)["q"]
            assert again.report.error == pytest.approx(output["q"].report.error, rel=0.03)
            named["v"].weight[3, 5] = torch.inf
            with pytest.raises(InputError, match=r"model\.v.*NaN or infinity"):
                matrices.quantize_matrices(read, named, 0.01)


def test_more_damping_where_the_first_is_not_enough() -> None:
    x = inputs(32, tokens=8).repeat(1, 2)  # of rank 8
    read = statistics(x, "q")
    tiny = 1e-9
    factors = factorize_orders(read.moment, tiny)
    assert factors is not None and factors.damping > tiny
    named = {"q": Rows("q", weight_of(5, 64))}
    expected = matrices.quantize_matrices([read], named, tiny)
    with kernels():
        found = matrices.quantize_matrices([read], named, tiny)
    near = found["q"].tensor.dequantize() - expected["q"].tensor.dequantize()
    assert (near.abs() < 1e-3).float().mean() > 0.9


def launches(columns: int, *, heavy: bool) -> Launches:
    """Of a block's four inputs, as a Llama has them, of which the kernel isn't run."""
    from quantkit.methods.ggml import kernel

    x = inputs(columns, heavy=heavy)
    names = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
    read = [statistics(x, *of_one) for of_one in names]
    named = {name: Rows(name, weight_of(3, columns), "Q4_K") for one in names for name in one}
    named["v"] = replace(named["v"], type="Q6_K")
    with pytest.MonkeyPatch.context() as patch, kernels():
        patch.setattr(feedback, "cholesky_", lambda matrix, threads: on_device_(matrix))
        with counted(kernel, "visit_panel") as found:
            matrices.quantize_matrices(read, named, 0.01)
    return found


@pytest.mark.parametrize("heavy", [False, True])
def test_launches_grow_with_panels_and_one_answer_is_waited_for(heavy: bool) -> None:
    """How the energy is spread, which decides about the second round, is read of all inputs."""
    few, many = launches(256, heavy=heavy), launches(512, heavy=heavy)
    assert few.waits == many.waits == 1
    rounds = 5 * (2 if heavy else 1)  # q and k together, v, o, gate and up together, down
    assert few.events.count("kernel") == rounds * 2 and many.events.count("kernel") == rounds * 4
    a_panel = (many.count - few.count) / (rounds * 2)
    fixed = few.count - rounds * 2 * a_panel
    # A Llama block of width 4096, whose down projection reads 14336.
    assert fixed + a_panel * rounds / 5 * (4 * 4096 + 14336) / 128 < 3000
