"""Recipes and suites: versioned YAML files, validated so that no misspelt key is ever ignored."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from quantkit import resources
from quantkit.errors import InputError


class _Strict(BaseModel):
    """Unknown keys are errors, and "4" is not 4: a typo must not fall back to a default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[int, Field(description="columns per group; -1 makes one group a row")]


class Override(_Strict):
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


class TypeOverride(_Strict):
    """Another ggml type for the tensors whose GGUF name matches a glob; the last match wins."""

    match: str
    type: str


class _Affine(_Strict):
    bits: Bits
    group_size: GroupSize
    symmetric: bool
    format: Literal["awq", "gptq"]
    ignore: list[str] = Field(default=["lm_head"], description="globs of modules left as they are")
    overrides: list[Override] = []

    @model_validator(mode="after")
    def _group_size_is_sane(self) -> _Affine:
        for size in [self.group_size, *(o.group_size for o in self.overrides)]:
            if size is not None and size != -1 and size < 8:
                raise ValueError(f"group_size {size} is not -1 (one group a row) or at least 8")
        return self


# What the calibration rows pass through between blocks: weights as they were, or as written.
Propagate = Literal["original", "quantized"]


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
    propagate: Propagate = "original"


class Awq(_Affine):
    """AWQ, arXiv 2306.00978."""

    method: Literal["awq"]
    scale_steps: Annotated[int, Field(ge=1, le=100)] = 20
    clip_search: bool = True
    propagate: Propagate = "original"


class Nf4(_Strict):
    """4-bit NormalFloat of QLoRA, arXiv 2305.14314, by bitsandbytes' own kernels."""

    method: Literal["nf4"]
    block_size: Literal[64, 128, 256, 512, 1024, 2048, 4096] = 64
    double_quant: bool = True
    format: Literal["bitsandbytes"] = "bitsandbytes"
    ignore: list[str] = ["lm_head"]


# fmt: off
Mix = Literal[
    "f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m",
    "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m",
    "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs",
    "iq1_m", "iq1_s", "tq2_0", "tq1_0",
]
# fmt: on


class _Gguf(_Strict):
    mix: Mix
    format: Literal["gguf"] = "gguf"
    overrides: list[TypeOverride] = []
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


def _tag(value: Any) -> str | None:
    """Which of the classes below a section ``quantize`` is meant for."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if not isinstance(value, dict):
        return None
    method, format = value.get("method"), value.get("format")
    tag = f"{method}-gguf" if method == "gptq" and format == "gguf" else method
    return tag if isinstance(tag, str) else None


Quantize = Annotated[
    Annotated[Rtn, Tag("rtn")]
    | Annotated[Gptq, Tag("gptq")]
    | Annotated[GptqGguf, Tag("gptq-gguf")]
    | Annotated[Awq, Tag("awq")]
    | Annotated[Nf4, Tag("nf4")]
    | Annotated[Ggml, Tag("ggml")],
    Discriminator(_tag),
]


class Calibration(_Strict):
    """Text that the statistics are taken on: rows of ``sequence_length`` tokens."""

    dataset: str = Field(description="a .jsonl or .txt file, relative to the recipe")
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


class _Versioned(_Strict):
    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$")]
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    description: str = ""

    def canonical(self) -> str:
        """The content with every default written out: what the digest is taken of."""
        return json.dumps(
            self.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":")
        )

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.canonical().encode()).hexdigest()


class Recipe(_Versioned):
    """What an artifact is. ``calibration`` is required by the methods that measure."""

    quantize: Quantize
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _measured_methods_calibrate(self) -> Recipe:
        method = self.quantize.method
        if method in ("gptq", "awq") and self.calibration is None:
            raise ValueError(f"method {method} needs a calibration section (dataset, samples, …)")
        if method in ("rtn", "nf4") and self.calibration is not None:
            raise ValueError(f"method {method} measures nothing: remove the calibration section")
        return self


class Likelihood(_Strict):
    """Held-out text for perplexity and KL divergence."""

    dataset: str
    sequence_length: Annotated[int, Field(ge=8)] = 512
    rows: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="the first so many rows; all of them when left out"
    )


class Regression(_Strict):
    """A JSONL file of prompts with checks."""

    cases: str


class Gate(_Strict):
    """One bound on one metric."""

    metric: str
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Gate:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        return self


class Suite(_Versioned):
    """How an artifact is judged."""

    likelihood: Likelihood
    regression: Regression | None = None
    gates: list[Gate] = []


_Document = TypeVar("_Document", bound=_Versioned)


class Loaded(BaseModel):
    """A recipe together with the file it came from, which its paths are relative to."""

    recipe: Recipe
    path: Path

    def calibration_dataset(self) -> Path | None:
        calibration = self.recipe.calibration
        return None if calibration is None else (self.path.parent / calibration.dataset).resolve()


class LoadedSuite(BaseModel):
    """A suite together with the file it came from, which its paths are relative to."""

    suite: Suite
    path: Path

    def resolve(self, relative: str) -> Path:
        return (self.path.parent / relative).resolve()


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> Loaded:
    """Load a shipped recipe by name or any recipe by path.

    ``settings`` are ``key=value`` overrides with dotted keys and YAML values; they make a derived
    recipe, named ``<name>+set``, with a digest of its own. Datasets set this way are relative to
    the working directory.
    """
    path = _find(name_or_path, resources.recipes(), "recipe")
    data = _read_yaml(path)
    for setting in settings or []:
        _apply(data, setting)
    if settings and isinstance(data.get("name"), str):
        data["name"] += "+set"
    return Loaded(recipe=_validate(Recipe, data, path), path=path)


def load_suite(name_or_path: str) -> LoadedSuite:
    """Load a shipped suite by name or any suite by path."""
    path = _find(name_or_path, resources.suites(), "suite")
    return LoadedSuite(suite=_validate(Suite, _read_yaml(path), path), path=path)


def shipped_recipes() -> list[Loaded]:
    """All shipped recipes, by name."""
    return [load_recipe(str(path)) for path in sorted(resources.recipes().glob("*.yaml"))]


def _find(name_or_path: str, folder: Path, kind: str) -> Path:
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = folder / f"{name_or_path}.yaml"
    if path.name == name_or_path and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise InputError(
        f"no such {kind}: neither a file nor a shipped name",
        where=name_or_path,
        mend=f"{hint}Shipped: {', '.join(names)}.",
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not a silent choice of the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"isn't valid YAML: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("holds no mapping of keys to values", where=str(path))
    return data


def _apply(data: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise InputError("is not key=value", where=f"--set {setting}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError("its value isn't valid YAML", where=f"--set {setting}") from error
    *parents, last = key.split(".")
    target: Any = data
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise InputError("names no section of the recipe", where=f"--set {setting}")
    if key == "calibration.dataset" and isinstance(value, str):
        value = str(Path(value).resolve())
    target[last] = value


def _validate(model: type[_Document], data: dict[str, Any], path: Path) -> _Document:
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [_explain(model, problem) for problem in error.errors()]
        raise InputError(
            "; ".join(problems),
            where=str(path),
            mend=f"docs/{model.__name__.lower()}s.md has every key.",
        ) from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    methods = set(_METHODS)
    location = [p for i, p in enumerate(problem["loc"]) if not (i == 1 and p in methods)]
    key = ".".join(str(part) for part in location)
    kind = problem["type"]
    given = problem.get("input")
    if kind == "extra_forbidden":
        known = _known_keys(model, problem["loc"])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        methods_known = ", ".join(name for name in _METHODS if "-" not in name)
        return f"{key}.method: must be one of {methods_known}"
    message = problem["msg"].removeprefix("Value error, ")
    where = f"{key}: " if key else ""
    if kind == "value_error":
        return f"{where}{message}"
    return f"{where}{message[0].lower()}{message[1:]}, not {given!r}"


_METHODS: dict[str, type[_Strict]] = {
    "rtn": Rtn,
    "gptq": Gptq,
    "awq": Awq,
    "nf4": Nf4,
    "ggml": Ggml,
    "gptq-gguf": GptqGguf,
}


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The keys that the section around ``location`` knows."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        if part in _METHODS:
            current = _METHODS[part]
            continue
        field = next((f for n, f in current.model_fields.items() if (f.alias or n) == part), None)
        if field is None:
            return []
        current = next((a for a in _flatten(field.annotation) if issubclass(a, BaseModel)), current)
    return sorted(field.alias or name for name, field in current.model_fields.items())


def _flatten(annotation: Any) -> list[type]:
    """All classes inside a possibly nested annotation such as ``list[Gate] | None``."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments:
        return [annotation] if isinstance(annotation, type) else []
    return [found for argument in arguments for found in _flatten(argument)]
