"""All columns of a weight, visited by a kernel that takes a panel of them at a time.

``feedback`` has the arithmetic. On a GPU the targets of all later columns follow the errors of a
panel by one matrix product; the kernel does all that is within the panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.methods.ggml.scales import CodeRounding, Scales

_PANEL = 128  # columns, a multiple of every group


def visit_panels(
    weight: Tensor,
    columns: Tensor,
    upper: Tensor,
    scales: Scales,
    rounding: CodeRounding,
    *,
    damping: float,
    drifted: Tensor | None,
    size: int,
    choose: bool,
) -> tuple[Tensor, Tensor]:
    """Visit all columns of ``weight`` (out, in) float32, in the order of ``columns`` (in,).

    upper: V (in, in) in that order; damping: by which the hessian was damped; drifted: what drift
    adds to D V, (in, out) in that order, None where the input hasn't drifted; size: of the groups
    whose columns are visited together, of one group where scales are chosen; choose: whether they
    are, else ``scales`` holds them. Returns the rounded values, (in, out) int8 in the order in
    which they are stored, and the losses (out,), which count the damping where there is drift.
    """
    from quantkit.methods.ggml.kernel import Triangles, visit_panel

    width = len(columns)
    parts = upper.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2)
    parts = parts.permute(2, 0, 1).contiguous()  # of V, for each group
    eye = torch.eye(size, dtype=upper.dtype, device=upper.device).expand_as(parts)
    inverse = torch.linalg.solve_triangular(parts, eye, upper=True)
    # V with its columns multiplied by the inverse of their group's part: so errors move the targets
    # of a group by what would make all of its columns of D V vanish, if none had to be rounded.
    unit = torch.bmm(inverse.mT, upper.t().unflatten(0, (-1, size))).flatten(0, 1)
    triangles = Triangles.of(parts, inverse)
    work = weight.t()[columns].contiguous()
    targets = work.clone()
    if drifted is not None:
        shifts = torch.bmm(inverse.mT, drifted.contiguous().unflatten(0, (-1, size)))
        targets += shifts.flatten(0, 1)
    codes = torch.empty_like(work, dtype=torch.int8)
    losses = torch.zeros_like(work[0])
    groups = (columns // scales.layout.group).to(torch.int32)
    for first in range(0, width, _PANEL):
        last = min(first + _PANEL, width)
        with torch.cuda.device_of(work):  # Triton launches on the current device
            visit_panel(
                slice(first, last),
                targets=targets,
                work=work,
                codes=codes,
                losses=losses,
                unit=unit,
                triangles=triangles,
                groups=groups,
                scales=scales,
                rounding=rounding,
                damping=0.0 if drifted is not None else damping,
                choose=choose,
            )
        targets[last:].addmm_(unit[last:, first:last], work[first:last])
    stored = torch.empty_like(codes)
    stored[columns] = codes
    return stored, losses
