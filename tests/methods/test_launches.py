"""What one block of each method would launch on a GPU: not more where its linears are wider.

GPTQ and ggml's types with feedback, which work column after column, have tests of their own
(``gptq/test_kernel.py``, ``ggml/test_kernel.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from quantkit.methods import grids
from quantkit.methods.awq.method import Awq
from quantkit.methods.fp8 import Fp8
from quantkit.methods.linears import Linears
from quantkit.methods.rtn import Rtn
from quantkit.methods.smoothquant import SmoothQuant
from tests.helpers.kernels import Launches
from tests.helpers.measured_block import measured_block
from tests.helpers.tiny import Tiny

_GRID: dict[str, Any] = {"bits": 4, "group_size": 32, "symmetric": False, "format": "awq"}
METHODS: dict[str, Any] = {
    "rtn": Rtn(method="rtn", **_GRID),
    "fp8": Fp8(method="fp8"),
    "smoothquant": SmoothQuant(method="smoothquant"),
    "awq": Awq(method="awq", **_GRID),
}


def launches(method: Any, tiny: Tiny, width: int) -> int:
    measured = measured_block(tiny("llama", hidden_size=width, intermediate_size=2 * width))
    names = [n for n, module in measured.block.named_modules() if isinstance(module, nn.Linear)]
    schemes = dict.fromkeys(names, method.default_scheme())
    linears = Linears.of(measured.block, schemes, measured.inputs, measured.folds)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # operations are seen on the thread that watches alone
    try:
        with Launches() as found:
            method.quantize(linears)
    finally:
        torch.set_num_threads(before)
    return found.count


@pytest.mark.parametrize("name", METHODS)
def test_launches_dont_grow_with_columns(
    name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "_AT_ONCE", grids._AT_ONCE_ON_GPU)
    narrow, wide = (launches(METHODS[name], tiny, width) for width in (64, 256))
    assert abs(wide - narrow) < 0.01 * narrow  # a search may find another place to look at
    # The search for scales and ranges tries dozens of them, on all rows at once.
    assert wide < (7000 if name == "awq" else 500)
