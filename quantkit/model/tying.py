"""Whether embeddings that a config ties are one tensor in the checkpoint too."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from quantkit.base.errors import CheckpointWarning
from quantkit.checkpoint.reader import Checkpoint
from quantkit.model.skeleton import Skeleton

_TIE = "tie_word_embeddings"
_BYTES = 1 << 26  # of each tensor that are compared at a time


def settle_tying(checkpoint: Checkpoint) -> None:
    """Untie the checkpoint's config where it ties two tensors that are stored and differ.

    transformers runs such a model with both; other engines go by the config, and would leave out
    the output embedding. Warns then. Raises InputError for what isn't a decoder of transformers.
    """
    if not _may_differ(checkpoint):
        return
    skeleton = Skeleton(checkpoint)
    for target, source in skeleton.model.all_tied_weights_keys.items():
        one, other = skeleton.names.get(target), skeleton.names.get(source)
        if one is None or other is None:  # experts, which have other names here
            continue
        if not _equal(checkpoint, one, other):
            checkpoint.config[_TIE] = False
            set_field(checkpoint.config, _TIE, False)  # in its part for text too
            warnings.warn(
                f"{checkpoint.directory / 'config.json'} ties {one} to {other}, and the checkpoint "
                "holds both with different values: as in transformers, both count. What is "
                f'written has "{_TIE}": false.',
                CheckpointWarning,
                stacklevel=2,
            )
            return


def _may_differ(checkpoint: Checkpoint) -> bool:
    """Whether two matrices have a row for each token, as a glance at the header tells."""
    config = checkpoint.config
    text = config.get("text_config")
    tokens = config.get("vocab_size") or (text or {}).get("vocab_size")
    if config.get(_TIE) is False or not isinstance(tokens, int):
        return False
    shapes = [entry.shape for entry in checkpoint.entries.values()]
    return sum(len(shape) == 2 and shape[0] >= tokens for shape in shapes) > 1


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    shape = checkpoint.shape(one)
    if one == other or shape != checkpoint.shape(other):
        return one == other
    rows = max(1, _BYTES // max(1, 4 * shape[-1]))
    return all(
        torch.equal(*(checkpoint.read_rows(key, start, start + rows) for key in (one, other)))
        for start in range(0, shape[0], rows)
    )


def set_field(config: dict[str, Any], field: str, value: object) -> None:
    """Set a field where the config has it, which may be in its part for text."""
    text = config.get("text_config")
    if isinstance(text, dict) and field in text:
        config["text_config"] = {**text, field: value}
        if field not in config:
            return
    config[field] = value
