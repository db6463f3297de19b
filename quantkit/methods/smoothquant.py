"""SmoothQuant: what makes activations hard to round is moved into the weights.

Xiao et al., arXiv 2211.10438. Where both a linear's inputs and its weights are rounded to 8 bits,
a few features that are much larger than the others cost all others their precision. Dividing
feature j of the input by

    s_j = a_j^α / w_j^(1 - α)

and multiplying column j of the weights by it changes nothing but what is rounded. a_j is the size
of the feature, w_j the largest weight that reads it.

The paper takes a_j as the largest |x_j| ever seen, for scales that are fixed for all tokens. Here
a token's scale is its own, so a feature counts by how large it usually is: a_j is its root mean
square, which one extreme token (often the first of a text) can't decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST = 1e-6  # of the largest


def scale(activation: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """s (in,) for inputs of size ``activation`` (in,), read by ``weights`` (out, in) float32."""
    largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    return _positive(activation) ** alpha / _positive(largest) ** (1 - alpha)


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=_SMALLEST * float(values.max().clamp(min=_SMALLEST)))
