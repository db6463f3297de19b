"""The methods that a recipe may name. Adding one takes a file, and its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from quantkit.methods.awq.method import Awq
from quantkit.methods.fp8 import Fp8
from quantkit.methods.ggml.method import Ggml
from quantkit.methods.gptq.method import Gptq
from quantkit.methods.gptq.mix import GptqMix
from quantkit.methods.method import Method
from quantkit.methods.nf4 import Nf4
from quantkit.methods.rtn import Rtn
from quantkit.methods.smoothquant import SmoothQuant

METHODS: dict[str, type[Method]] = {
    method.tag: method for method in (Rtn, Gptq, GptqMix, Awq, SmoothQuant, Fp8, Nf4, Ggml)
}


def tag_of(section: Mapping[str, Any]) -> str | None:
    """The tag of the method that a recipe's section ``quantize`` is meant for; None for none."""
    return next((tag for tag, method in METHODS.items() if method.describes(section)), None)


def with_trait(trait: Literal["rounds_inputs", "rescales"]) -> set[str]:
    """Tags of the methods of which this class attribute is true."""
    return {tag for tag, method in METHODS.items() if getattr(method, trait)}
