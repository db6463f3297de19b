"""What a model can read: the ids that its embedding has rows for, and how many positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantkit.base.errors import InputError
from quantkit.model.names import Described
from quantkit.model.skeleton import Skeleton

_STRETCHES = ("linear", "dynamic")  # ropes whose factor multiplies the config's positions


@dataclass(frozen=True)
class Limits:
    """The limits of a model's inputs.

    vocabulary: rows of the input embedding; positions: tokens of the longest text, None where the
    config names no limit; fixed: whether a longer one can't be computed at all, since the model has
    a table of positions, rather than being beyond what the model was trained for.
    """

    vocabulary: int
    positions: int | None
    fixed: bool = False

    @classmethod
    def of(cls, skeleton: Skeleton, source: Described) -> Limits:
        """The limits of a model with the weights of ``source``, which may resize the embedding."""
        model = skeleton.model
        embedding = model.get_input_embeddings()
        name = next(name for name, part in model.named_modules() if part is embedding)
        vocabulary = source.shape(skeleton.key(f"{name}.weight"))[0]
        if fixed := fixed_positions(model):
            return cls(vocabulary, fixed, fixed=True)
        return cls(vocabulary, _positions(skeleton.config.get_text_config()))

    def check_ids(self, ids: Sequence[int], tokenizer: Any, where: str) -> None:
        """Raise InputError where ``ids``, which ``tokenizer`` made, aren't all in the embedding."""
        largest = max(ids, default=0)
        if largest >= self.vocabulary:
            raise InputError(
                f"holds the token {tokenizer.convert_ids_to_tokens(largest)!r} with the id "
                f"{largest}, but the model's embedding has only {self.vocabulary} rows",
                subject=where,
                fix="Use the tokenizer that the model was trained with. Where tokens were added to "
                "it, resize the model's embedding too (resize_token_embeddings), or leave them out "
                "of the text.",
            )

    def too_long(self, tokens: int, new_tokens: int = 1) -> str | None:
        """Why a prompt of ``tokens`` that is continued by ``new_tokens`` is too long, if it is.

        A continuation may go beyond positions that aren't fixed, as transformers lets it.
        """
        if self.positions is None:
            return None
        if tokens > self.positions:
            return f"the prompt has {tokens} tokens, and the model {self.positions} positions"
        # The last token that is generated isn't read again.
        if self.fixed and tokens + new_tokens - 1 > self.positions:
            return (
                f"{new_tokens} tokens after a prompt of {tokens} don't fit in the model's "
                f"{self.positions} positions, only {self.positions + 1 - tokens} do"
            )
        return None


def fixed_positions(model: Any) -> int | None:
    """How many positions a model of transformers has a table of; None where it has no table."""
    # A tower for images has a table of its own, for its patches.
    decoder = model.get_decoder()
    towers = tuple(f"{n}." for n, part in decoder.named_modules() if n and _is_model(part))
    parts = [(n, part) for n, part in decoder.named_modules() if not f"{n}.".startswith(towers)]
    tables = [rows for name, part in parts if (rows := _table(name, part))]
    config = model.config.get_text_config()
    # MPT has its biases for that many positions, whatever it is asked.
    tables += [config.max_seq_len] if config.model_type == "mpt" else []
    return min(tables, default=None)


def _is_model(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def check_length(length: int, limits: Limits, section: str) -> None:
    """Raise InputError for rows of more tokens than the model has positions."""
    if limits.positions is not None and length > limits.positions:
        raise InputError(
            f"sequence_length {length} exceeds the model's {limits.positions} positions",
            where=section,
            fix=f"Set {section}.sequence_length to at most {limits.positions}.",
        )


def _table(name: str, module: nn.Module) -> int | None:
    """How many positions a module has a table for; None where it is no such module."""
    # GPT-J and CodeGen keep a table of rotations, CTRL one of sines.
    for leaf in ("embed_positions", "pos_encoding"):
        value = getattr(module, "_buffers", {}).get(leaf)
        if value is not None and value.dim() == 2:
            return int(value.shape[0])
    leaf = name.rpartition(".")[2]
    if not isinstance(module, nn.Embedding) or not ("pos" in leaf or leaf == "wpe"):
        return None
    rows = module.num_embeddings
    if module.padding_idx is not None:  # RoBERTa's positions begin after it
        return rows - module.padding_idx - 1
    return rows - int(getattr(module, "offset", 0))  # OPT's begin at 2


def _positions(config: Any) -> int | None:
    """The positions that a config names, those to which its rope is stretched included."""
    named = getattr(config, "max_position_embeddings", None)
    if not isinstance(named, int) or isinstance(named, bool) or named < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if not isinstance(factor, int | float):
        return named
    # As vLLM reads it: with YaRN many configs still name the length before it.
    if kind == "yarn":
        return max(named, int((rope.get("original_max_position_embeddings") or named) * factor))
    return max(named, int(named * factor)) if kind in _STRETCHES else named
