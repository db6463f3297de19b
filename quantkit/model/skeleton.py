"""A model without its weights, and where its decoder layers are."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from quantkit.base.errors import InputError
from quantkit.checkpoint.views import View, ViewedSource
from quantkit.model.build import empty_model
from quantkit.model.expert_layout import holds_experts, separate
from quantkit.model.experts import Experts
from quantkit.model.names import Described, Match, TextPart, match_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Skeleton:
    """A decoder of transformers with its parameters on the meta device.

    Its computed buffers (rotary frequencies, masks) are real, since no checkpoint holds them.

    model: of transformers, with images' and other inputs' towers where it has some, and each expert
    of a mixture as linears of its own; config: the model's; layers: its decoder layers; prefix:
    their name, such as ``model.layers``; names: the checkpoint key of every parameter; fusions: of
    parameters that transformers makes of several tensors; views: parts of the checkpoint's tensors
    that have keys of their own; unused: keys that the model knows and has no use for; towers:
    names of the models within it that text doesn't run through.
    """

    def __init__(
        self,
        checkpoint: Described,
        dtype: torch.dtype | None = None,
        weights: Described | None = None,
    ) -> None:
        """Build the model of a checkpoint's config, computing in ``dtype`` (default: the config's).

        weights: another version of the same model whose keys ``names`` shall have (default: the
        checkpoint itself). Raises InputError for configs that transformers doesn't know,
        encoder-decoders, and checkpoints whose keys don't match the model.
        """
        self.directory = checkpoint.directory
        self.model = empty_model(checkpoint, dtype)
        self.config: Any = self.model.config
        where = str(checkpoint.directory)
        if getattr(self.config, "is_encoder_decoder", False):
            raise InputError("is an encoder-decoder; only decoders are supported", subject=where)
        _refuse_encoder(self.config, where)
        decoder = name_of(self.model, self.model.get_decoder())
        self.prefix, self.layers = _find_layers(self.model, decoder, where)
        self.towers = _towers(self.model, decoder)
        source = weights or checkpoint
        match = match_names(self.model, source, self._part(source, decoder))
        self.names, self.fusions, self.unused = dict(match.names), dict(match.fusions), match.unused
        self.views: dict[str, View] = {}
        self._separate_experts(match, source, where)

    def _part(self, source: Described, decoder: str) -> TextPart | None:
        """Where ``source`` holds the text model alone, how its names are to be read."""
        names = getattr(source, "text_names", None)
        if names is None or self.config.get_text_config(decoder=True) is self.config:
            return None
        return TextPart((names[0], decoder), (names[1], self.head or names[1]))

    def _separate_experts(self, match: Match, source: Described, where: str) -> None:
        proven: set[Any] = set()
        for name, module in list(self.model.named_modules()):
            if not holds_experts(module):
                continue
            experts, views = separate(name, module, match, source, where, proven)
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent).register_module(leaf, experts)
            for parameter in [n for n in self.names if n.startswith(f"{name}.")]:
                del self.names[parameter]
            for parameter in [n for n in self.fusions if n.startswith(f"{name}.")]:
                del self.fusions[parameter]
            norm = {n: k for n, k in match.names.items() if n.startswith(f"{name}.post_")}
            self.names |= norm
            for parameter, view in views.items():
                self.names[parameter] = self._key_of(view, parameter.removeprefix(f"{name}."))

    def _key_of(self, view: View, place: str) -> str:
        """The key of an expert's tensor, which gets one where it is a part of another tensor.

        place: its name within the experts, such as ``3.gate_proj.weight``.
        """
        if view == View(view.key):
            return view.key
        parent = view.key.removesuffix(".weight").rpartition(".")[0]
        holder = parent if "expert" in parent.rpartition(".")[2] else f"{parent}.experts"
        key = f"{holder}.{place}"
        self.views[key] = view
        return key

    def layer_name(self, index: int) -> str:
        """The name of a decoder layer's module."""
        return f"{self.prefix}.{index}"

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linears of one layer by their name within it, in the order of their definition.

        A router may be a kind of linear that returns more than a product; it isn't among them.
        """
        return {
            name: module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear) and multiplies(module)
        }

    def experts(self, index: int) -> dict[str, Experts]:
        """The mixtures of experts of one layer by their name within it."""
        return {
            name: module
            for name, module in self.layers[index].named_modules()
            if isinstance(module, Experts)
        }

    @property
    def head(self) -> str | None:
        """The name of the output embedding; None for a model without one."""
        head = self.model.get_output_embeddings()
        return None if head is None else name_of(self.model, head)

    @property
    def has_experts(self) -> bool:
        """Whether some layer is a mixture of experts."""
        return any(isinstance(module, Experts) for module in self.model.modules())

    def key(self, name: str) -> str:
        """The checkpoint key of a parameter."""
        return self.names[name]

    def viewed(self, source: Any) -> Any:
        """``source``, read by this model's keys where parts of its tensors have some."""
        return ViewedSource(source, self.views) if self.views else source


def multiplies(linear: nn.Linear) -> bool:
    """Whether a linear gives the product with its weight and no more.

    A kind of its own (a router, Falcon's) is tried on small random numbers.
    """
    kind = type(linear)
    if kind.forward is nn.Linear.forward:
        return True
    trial = copy.copy(linear)
    generator = torch.Generator().manual_seed(0)
    weight, rows, other = (torch.randn(n, 4, generator=generator) for n in (6, 3, 6))
    bias = None if linear.bias is None else other[:, 0].contiguous()
    trial._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    try:
        given = kind.forward(trial, rows)
        return torch.allclose(given, nn.functional.linear(rows, weight, bias), atol=1e-5)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, KeyError):
        return False


def _refuse_encoder(config: Any, where: str) -> None:
    """Raise InputError for a model that reads all tokens at once, and so predicts no next one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    both_ways = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both_ways and getattr(config, "is_decoder", None) is False:
        raise InputError(
            f"is an encoder ({config.model_type}), which predicts no next token; only decoders are "
            "supported",
            subject=where,
        )


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The name of a module within ``model``."""
    return next(name for name, part in model.named_modules() if part is module)


def _towers(model: PreTrainedModel, decoder: str) -> tuple[str, ...]:
    """Names of the models within ``model`` that are neither around its decoder nor in it."""
    from transformers import PreTrainedModel

    def apart(name: str) -> bool:
        return not f"{decoder}.".startswith(f"{name}.") and not f"{name}.".startswith(f"{decoder}.")

    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower in found)
        if name and decoder and isinstance(module, PreTrainedModel) and apart(name) and not inside:
            found.append(name)
    return tuple(found)


def _find_layers(model: PreTrainedModel, decoder: str, where: str) -> tuple[str, nn.ModuleList]:
    """The outermost list in the decoder with as many members as the config has hidden layers.

    Raises InputError where there is none, or where layers are spread over several lists.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if count is None:
        raise InputError(
            f"{type(model).__name__} says nowhere how many decoder layers it has "
            "(num_hidden_layers), so they can't be found",
            where=where,
        )
    prefix = f"{decoder}." if decoder else ""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and name.startswith(prefix)
    }
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of {count} decoder layers", where=where
        )
    chosen = min(lists, key=lambda name: name.count("."))
    beside = [
        name
        for name, module in lists.items()
        if name.rpartition(".")[0] == chosen.rpartition(".")[0] and _has_linears(module)
    ]
    if len(beside) > 1:
        raise InputError(
            f"the layers of {type(model).__name__} are spread over {', '.join(beside)}, and can't "
            "be run one by one",
            where=where,
        )
    return (beside or [chosen])[0], lists[(beside or [chosen])[0]]


def _has_linears(layers: nn.ModuleList) -> bool:
    """Whether the members of a list have linears, rather than being some themselves."""
    return any(
        isinstance(part, nn.Linear)
        for layer in layers
        for name, part in layer.named_modules()
        if name
    )
