"""Recipes: versioned YAML files that alone say what an artifact is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from quantkit.base import resources
from quantkit.documents.dataset import Dataset, DatasetKey, resolve
from quantkit.documents.document import Strict, Versioned, apply, find, read_yaml, validate

Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(description="columns per group; -1 makes one group a row")]


class Override(Strict):
    """Another scheme for the modules whose full name matches a glob; the last match wins."""

    match: str
    skip: bool = False
    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Override:
        changes = any(value is not None for value in (self.bits, self.group_size, self.symmetric))
        if self.skip == changes:
            raise ValueError("an override needs skip: true, or bits, group_size or symmetric")
        return self


class TypeOverride(Strict):
    """Another ggml type for the tensors whose GGUF name matches a glob; the last match wins."""

    match: str
    type: str


class _Affine(Strict):
    bits: Bits
    group_size: GroupSize
    symmetric: bool
    format: Literal["awq", "gptq", "compressed-tensors", "gguf"]
    ignore: list[str] = Field(default=["lm_head"], description="globs of modules left as they are")
    overrides: list[Override] = Field(default=[])

    @model_validator(mode="after")
    def _group_size_is_sane(self) -> _Affine:
        for size in [self.group_size, *(o.group_size for o in self.overrides)]:
            if size is not None and size != -1 and size < 8:
                raise ValueError(f"group_size {size} is not -1 (one group a row) or at least 8")
        return self


# What the calibration rows pass through between blocks: weights as they were, or as written.
Propagate = Literal["original", "quantized"]
# Or both: what quantization has done to the inputs so far is made up for (GPTAQ).
Correct = Literal["original", "quantized", "corrected"]


class Rtn(_Affine):
    """Round to nearest."""

    method: Literal["rtn"]


class Gptq(_Affine):
    """GPTQ, arXiv 2210.17323."""

    method: Literal["gptq"]
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    activation_order: bool = Field(default=True, description="static: no permutation is stored")
    clip_search: bool = True
    block_size: Annotated[int, Field(ge=1)] = 128
    propagate: Correct = "original"


class Awq(_Affine):
    """AWQ, arXiv 2306.00978."""

    method: Literal["awq"]
    scale_steps: Annotated[int, Field(ge=1, le=100)] = 20
    clip_search: bool = True
    propagate: Propagate = "original"


class SmoothQuant(Strict):
    """SmoothQuant, arXiv 2211.10438: weights and inputs of linears in int8."""

    method: Literal["smoothquant"]
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="how much of the inputs' spread is moved into the weights"
    )
    format: Literal["compressed-tensors"] = "compressed-tensors"
    ignore: list[str] = Field(default=["lm_head"])


class Fp8(Strict):
    """Weights and inputs of linears in FP8 (E4M3), arXiv 2209.05433."""

    method: Literal["fp8"]
    format: Literal["compressed-tensors"] = "compressed-tensors"
    ignore: list[str] = Field(default=["lm_head"])


class Nf4(Strict):
    """4-bit NormalFloat of QLoRA, arXiv 2305.14314, by bitsandbytes' own kernels."""

    method: Literal["nf4"]
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True
    format: Literal["bitsandbytes"] = "bitsandbytes"
    ignore: list[str] = Field(default=["lm_head"])


# fmt: off
Mix = Literal[
    "f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m",
    "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m",
    "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs",
    "iq1_m", "iq1_s", "tq2_0", "tq1_0",
]
# fmt: on


class _Gguf(Strict):
    mix: Mix
    format: Literal["gguf"] = "gguf"
    overrides: list[TypeOverride] = Field(default=[])
    no_fallback: bool = Field(
        default=False, description="refuse rows that the mix's type can't hold"
    )
    pre_tokenizer: str | None = Field(
        default=None, description="llama.cpp's name, where none can be shown to be the right one"
    )


class Ggml(_Gguf):
    """llama.cpp's types; with calibration, its importance weights too."""

    method: Literal["ggml"]


class GptqGguf(_Gguf):
    """GPTQ's error feedback on the grids of llama.cpp's types."""

    method: Literal["gptq"]
    format: Literal["gguf"]
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    propagate: Literal["original", "corrected"] = "original"


def _tag(value: Any) -> str | None:
    """Which of the classes below a section ``quantize`` is meant for."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, dict):
        return None
    method, format = value.get("method"), value.get("format")
    # With bits it is an integer grid, which needs no mix.
    mixed = method == "gptq" and format == "gguf" and ("mix" in value or "bits" not in value)
    tag = "gptq-gguf" if mixed else method
    return tag if isinstance(tag, str) else None


Quantize = Annotated[
    Annotated[Rtn, Tag("rtn")]
    | Annotated[Gptq, Tag("gptq")]
    | Annotated[GptqGguf, Tag("gptq-gguf")]
    | Annotated[Awq, Tag("awq")]
    | Annotated[SmoothQuant, Tag("smoothquant")]
    | Annotated[Fp8, Tag("fp8")]
    | Annotated[Nf4, Tag("nf4")]
    | Annotated[Ggml, Tag("ggml")],
    Discriminator(_tag),
]


class Calibration(Strict):
    """Text that the statistics are taken on: rows of ``sequence_length`` tokens."""

    dataset: DatasetKey = Field(
        description="a .jsonl or .txt file, relative to the recipe, or a data set of the Hub"
    )
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


class Recipe(Versioned):
    """What an artifact is. ``calibration`` is required by the methods that measure."""

    quantize: Quantize
    calibration: Calibration | None = None
    target: Literal["vllm", "transformers", "llama.cpp"] | None = Field(
        default=None, description="refuse, before work starts, what this engine doesn't load"
    )

    @model_validator(mode="after")
    def _measured_methods_calibrate(self) -> Recipe:
        method = self.quantize.method
        if method in ("gptq", "awq", "smoothquant") and self.calibration is None:
            raise ValueError(f"method {method} needs a calibration section (dataset, samples, …)")
        if method in ("rtn", "fp8", "nf4") and self.calibration is not None:
            raise ValueError(f"method {method} measures nothing: remove the calibration section")
        return self


class Loaded(BaseModel):
    """A recipe together with the file it came from, which its paths are relative to."""

    recipe: Recipe
    path: Path

    def calibration_dataset(self) -> Dataset | None:
        calibration = self.recipe.calibration
        return None if calibration is None else resolve(calibration.dataset, self.path.parent)


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> Loaded:
    """Load a shipped recipe by name or any recipe by path.

    ``settings`` are ``key=value`` overrides with dotted keys and YAML values; they make a derived
    recipe, named ``<name>+set``, with a digest of its own. Datasets set this way are relative to
    the working directory.
    """
    path = find(name_or_path, resources.recipes(), "recipe")
    data = read_yaml(path)
    for setting in settings or []:
        apply(data, setting)
    if settings and isinstance(data.get("name"), str):
        data["name"] += "+set"
    return Loaded(recipe=validate(Recipe, data, path, _METHODS), path=path)


def recipe_from(content: dict[str, Any], where: Path) -> Recipe:
    """The recipe that a manifest or a program holds. Raises InputError that names ``where``."""
    return validate(Recipe, content, where, _METHODS)


def shipped_recipes() -> list[Loaded]:
    """All shipped recipes, by name."""
    return [load_recipe(str(path)) for path in sorted(resources.recipes().glob("*.yaml"))]


_METHODS: dict[str, type[Strict]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "smoothquant": SmoothQuant,
    "fp8": Fp8,
    "nf4": Nf4,
    "ggml": Ggml,
    "gptq-gguf": GptqGguf,
}
