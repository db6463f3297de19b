"""Data sets of the Hub, pinned to a commit; the library ``datasets`` reads their rows."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from quantkit.base.errors import InputError, MachineError, not_installed
from quantkit.documents.document import Strict
from quantkit.documents.forms import KEYS

_COMMIT = re.compile(r"[0-9a-f]{40}")

_TEXT = "text"


class HubDataset(Strict):
    """A data set of the Hub, pinned to a commit, or a folder in the form of one.

    The library ``datasets`` reads it, from its own cache if it was downloaded before.
    """

    hub: str = Field(description="owner/name, or a folder: ./data, ../data, /data")
    config: str | None = Field(default=None, description="such as wikitext-2-raw-v1")
    split: str = "train"
    column: str = Field(default=_TEXT, description="of strings, or of lists of chat messages")
    revision: str | None = Field(default=None, description="commit; a folder has none")
    rows: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="how many of the first to take; the rest isn't downloaded"
    )
    join: str | None = Field(
        default=None, description="text between rows, which makes one document of them all"
    )

    @model_validator(mode="after")
    def _is_pinned(self) -> HubDataset:
        if self.is_folder and self.revision is not None:
            raise ValueError("a folder has no revision")
        if not self.is_folder and not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"revision must pin {self.hub} to a commit of 40 hexadecimal digits "
                f"(huggingface.co/datasets/{self.hub}/commits/main lists them)"
            )
        return self

    @property
    def is_folder(self) -> bool:
        """Whether ``hub`` is a path rather than owner/name."""
        return self.hub.startswith(("./", "../", "/")) or self.hub in (".", "..")

    def relative_to(self, directory: Path) -> HubDataset:
        """The same data set; the path of a folder is made absolute, relative to ``directory``."""
        if not self.is_folder:
            return self
        return self.model_copy(update={"hub": str((directory / self.hub).resolve())})

    def __str__(self) -> str:
        parts = [self.hub, self.config, self.split, self.column]
        return ":".join(part for part in parts if part)


def library() -> Any:
    """The package ``datasets``. Raises MachineError where it isn't installed."""
    try:
        import datasets
    except ImportError:
        raise not_installed("datasets", "datasets") from None
    return datasets


def read_column(dataset: HubDataset) -> list[Any]:
    """The values of a data set's column.

    Where no column is called ``text``, and the recipe names no other, whole rows in a form that
    files may have too: messages, or an instruction and its answer. Raises InputError where it can't
    be loaded, MachineError where the Hub can't be reached.
    """
    datasets = library()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            dataset.hub,
            dataset.config,
            split=dataset.split,
            revision=dataset.revision,
            streaming=dataset.rows is not None,
        )
        columns = list(table.column_names or [])
        rows = list(islice(table, dataset.rows))
        values = [row.get(dataset.column) for row in rows]
    except (ConnectionError, TimeoutError) as error:
        raise MachineError(
            f"the Hub can't be reached ({type(error).__name__}: {_first_line(error)})",
            where=str(dataset),
            fix="Download it once with the network; then it is read from the cache of datasets.",
        ) from error
    except Exception as error:  # datasets passes on the errors of many libraries
        raise InputError(
            f"datasets can't load it ({type(error).__name__}: {_first_line(error)})",
            where=str(dataset),
            fix="Check hub, config, split and revision, and HF_TOKEN for a gated data set.",
        ) from error
    if columns and dataset.column not in columns:
        if dataset.column == _TEXT and {*KEYS} & {column.strip().lower() for column in columns}:
            return rows
        raise InputError(
            f"has no column {dataset.column}; it has {', '.join(columns)}", subject=str(dataset)
        )
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
