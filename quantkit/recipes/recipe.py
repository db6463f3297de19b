"""Recipes: versioned YAML files that alone say what an artifact is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from quantkit.base import resources
from quantkit.documents.dataset import Dataset, DatasetKey, resolve_dataset
from quantkit.documents.document import (
    Strict,
    Versioned,
    apply_setting,
    directory_of,
    find_document,
    read_yaml,
    validate,
)
from quantkit.formats.registry import FORMATS
from quantkit.methods.method import Method
from quantkit.methods.registry import METHODS, tag_of


def _tag(section: Any) -> str | None:
    if isinstance(section, BaseModel):
        section = section.model_dump()
    return tag_of(section) if isinstance(section, Mapping) else None


if TYPE_CHECKING:
    Quantize = Method
else:  # one of the registered classes, which type checkers can't know
    Quantize = Annotated[
        Union[tuple(Annotated[method, Tag(tag)] for tag, method in METHODS.items())],  # noqa: UP007
        Discriminator(_tag),
    ]


class Calibration(Strict):
    """Text that inputs are measured on: rows of ``sequence_length`` tokens."""

    dataset: DatasetKey = Field(
        description="a file of text, relative to the recipe, or a data set of the Hub"
    )
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=8)] = 512
    seed: int = 0
    bos: bool = Field(
        default=False,
        description="begin rows and documents as the tokenizer begins a text: with BOS, if it adds "
        "one",
    )


class Recipe(Versioned):
    """What an artifact is. ``calibration`` is required by the methods that measure inputs."""

    quantize: Quantize
    calibration: Calibration | None = None
    target: Literal["vllm", "transformers", "llama.cpp"] | None = Field(
        default=None, description="refuse, before work starts, what this engine doesn't load"
    )

    @model_validator(mode="after")
    def _calibrates_where_needed(self) -> Recipe:
        method = self.quantize
        if method.calibration == "required" and self.calibration is None:
            raise ValueError(
                f"method {method.method} needs a calibration section (dataset, samples, …)"
            )
        if method.calibration == "unused" and self.calibration is not None:
            raise ValueError(
                f"method {method.method} measures nothing: remove the calibration section"
            )
        return self

    @model_validator(mode="after")
    def _format_is_known(self) -> Recipe:
        if self.quantize.format not in FORMATS:
            raise ValueError(
                f"quantize.format: must be one of {', '.join(FORMATS)}, "
                f"not {self.quantize.format!r}"
            )
        return self


class LoadedRecipe(BaseModel):
    """A recipe and the file it came from; paths in the recipe are relative to that file."""

    recipe: Recipe
    path: Path

    def calibration_dataset(self) -> Dataset | None:
        calibration = self.recipe.calibration
        if calibration is None:
            return None
        return resolve_dataset(calibration.dataset, directory_of(self.path))


def load_recipe(name_or_path: str, settings: list[str] | None = None) -> LoadedRecipe:
    """Load a shipped recipe by name or any recipe by path.

    ``settings`` are ``key=value`` overrides with dotted keys and YAML values; they make a derived
    recipe, named ``<name>+set``, with a digest of its own. Datasets set this way are relative to
    the working directory.
    """
    path = find_document(name_or_path, resources.recipes(), "recipe")
    data = read_yaml(path)
    for setting in settings or []:
        apply_setting(data, setting)
    if settings and isinstance(data.get("name"), str):
        data["name"] += "+set"
    return LoadedRecipe(recipe=validate(Recipe, data, path, METHODS), path=path)


def recipe_from(content: dict[str, Any], where: Path) -> Recipe:
    """The recipe that a manifest or a program holds. Raises InputError that names ``where``."""
    return validate(Recipe, content, where, METHODS)


def shipped_recipes() -> list[LoadedRecipe]:
    """All shipped recipes, by name."""
    return [load_recipe(str(path)) for path in sorted(resources.recipes().glob("*.yaml"))]
