"""Versioned YAML documents (recipes, suites), in which a misspelt key is an error."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.base.errors import InputError
from quantkit.base.files import with_home
from quantkit.documents.content import is_pipe, locate_file, read_bytes
from quantkit.documents.explain import explain
from quantkit.documents.text import lone_surrogate, surrogate_message


class Strict(BaseModel):
    """A section in which unknown keys are errors, and "4" is not 4."""

    # So that no typo falls back to a default.

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Versioned(Strict):
    """A document with a name and a version. schema: of its keys."""

    schema_: Literal[1] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._+-]*$")]
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    description: str = ""

    def canonical(self) -> str:
        """The content as JSON, without what equals its default. The digest is that of this text."""
        # So that a key which a later version of the program adds changes no published digest. The
        # price is that defaults never change.
        content = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """sha256 of the content, whatever the layout of its file."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


Document = TypeVar("Document", bound=Versioned)


def find_document(name_or_path: str, folder: Path, kind: str) -> Path:
    """The file or pipe of that path, "-" for standard input, or the file of that name shipped in
    ``folder``.

    kind: for the message. Raises InputError where there is neither.
    """
    path = Path("/dev/stdin") if name_or_path == "-" else with_home(name_or_path)
    if path.is_file() or is_pipe(path):
        return path
    shipped = folder / f"{name_or_path}.yaml"
    if path.name == name_or_path and shipped.is_file():
        return shipped
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    close = difflib.get_close_matches(name_or_path, names, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise InputError(
        f"is no {kind}: neither a file nor a shipped name",
        subject=name_or_path,
        fix=f"{hint}Shipped: {', '.join(names)}.",
    )


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error; PyYAML takes the last one.

    So is text that neither a file can hold nor a system can take for a file's name.
    """

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        what = None
        if isinstance(value, str) and "\0" in value:
            what = "text holds the character of code 0"
        elif half := lone_surrogate(value):
            what = surrogate_message(half)
        if what is not None:
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is neither text nor a number", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file or pipe holds. Raises InputError for one that isn't YAML."""
    try:
        data = yaml.load(read_bytes(path).decode(), _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of bytes, dates and depth
        raise InputError(f"isn't valid YAML: {error}", subject=str(path)) from error
    if not isinstance(data, dict):
        raise InputError("holds no mapping of keys to values", subject=str(path))
    return data


def directory_of(path: Path) -> Path:
    """What paths in the document at ``path`` are relative to: for a pipe, where one works."""
    return Path.cwd() if is_pipe(path) else path.parent


def apply_setting(data: dict[str, Any], setting: str) -> None:
    """Set one ``key=value`` of --set in ``data``: a dotted key and a YAML value.

    Raises InputError for a setting of another form.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise InputError("isn't key=value", subject=f"--set {setting}")
    if lone_surrogate(text) is not None:
        raise InputError(
            "isn't UTF-8, as a recipe must be",
            subject=f"--set {setting}",
            fix="Give the file a name in UTF-8, or a link to it that has one.",
        )
    try:
        value = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("its value isn't valid YAML", where=f"--set {setting}") from error
    *parents, last = key.split(".")
    target: Any = data
    for parent in parents:
        target = target.setdefault(parent, {}) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise InputError("names no section of the recipe", subject=f"--set {setting}")
    if key == "calibration.dataset":
        value = _from_here(value)
    target[last] = value


def _from_here(dataset: Any) -> Any:
    """A data set of the command line, whose path is relative to the working directory."""
    if isinstance(dataset, str):
        return str(locate_file(dataset, Path.cwd()))
    if isinstance(dataset, dict) and str(dataset.get("hub", "")).startswith("."):
        return {**dataset, "hub": str(Path(dataset["hub"]).resolve())}
    return dataset


def validate(
    model: type[Document],
    data: dict[str, Any],
    path: Path,
    tags: Mapping[str, type[Strict]] | None = None,
) -> Document:
    """The document of class ``model`` whose keys and values are ``data``, read from ``path``.

    tags: the classes that a section may have, by its ``method``. Raises InputError that names the
    file and each key that is wrong.
    """
    tags = tags or {}
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = [explain(model, problem, tags) for problem in error.errors()]
        raise InputError(
            "; ".join(problems),
            where=str(path),
            fix=f"docs/{model.__name__.lower()}s.md has every key.",
        ) from error
