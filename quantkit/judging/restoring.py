"""An artifact's weights with some of them put back to the baseline's."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from quantkit.checkpoint.reader import TensorSource
from quantkit.model.skeleton import Skeleton

_SAME = 1e-3  # relative: GGUF keeps norms in float32, and Gemma's as 1 + w


class Restored:
    """``artifact`` with the tensors ``keys`` of ``baseline``. Implements ``TensorSource``."""

    def __init__(
        self, artifact: TensorSource, baseline: TensorSource, keys: Collection[str]
    ) -> None:
        self._artifact, self._baseline, self._keys = artifact, baseline, frozenset(keys)

    def keys(self) -> Iterable[str]:
        return self._artifact.keys()

    def read(self, key: str) -> Tensor:
        return self._of(key).read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._of(key).read_rows(key, start, stop)

    def _of(self, key: str) -> TensorSource:
        return self._baseline if key in self._keys else self._artifact


def is_rescaled(artifact: TensorSource, baseline: TensorSource, skeleton: Skeleton) -> bool:
    """Whether a norm or a bias inside the layers isn't what the baseline has.

    AWQ and SmoothQuant divide what a norm or a linear makes, and multiply the weights that read it.
    """
    vectors = {
        skeleton.key(name)
        for name, parameter in skeleton.model.named_parameters()
        if parameter.ndim == 1 and name.startswith(skeleton.prefix + ".")
    }
    return any(
        not torch.allclose(
            artifact.read(key).float(), baseline.read(key).float(), rtol=_SAME, atol=_SAME
        )
        for key in sorted(vectors)
    )
