"""Text from a file or a data set of the Hub, pinned so that it is the same for everyone."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from quantkit.base.errors import InputError, MachineError, not_installed
from quantkit.base.files import sha256
from quantkit.documents.document import Strict

_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubDataset(Strict):
    """A data set of the Hub, pinned to a commit, or a folder in the form of one.

    The library ``datasets`` reads it, from its own cache if it was downloaded before.
    """

    hub: str = Field(description="owner/name, or a folder: ./data, ../data, /data")
    config: str | None = Field(default=None, description="such as wikitext-2-raw-v1")
    split: str = "train"
    column: str = Field(default="text", description="of strings, or of lists of chat messages")
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


Dataset = Path | HubDataset
# The type of a document's key ``dataset``. Tags in <> are no keys: errors leave them out.
DatasetKey = Annotated[
    Annotated[str, Tag("<file>")] | Annotated[HubDataset, Tag("<hub>")],
    Discriminator(lambda value: "<hub>" if isinstance(value, dict | HubDataset) else "<file>"),
]


def resolve_dataset(dataset: str | HubDataset, directory: Path) -> Dataset:
    """A document's ``dataset``, with its path relative to the document's ``directory``."""
    if isinstance(dataset, HubDataset):
        return dataset.relative_to(directory)
    return (directory / dataset).resolve()


@dataclass(frozen=True)
class Document:
    """One document of a data set: text, or chat messages. where: its file and line, or its row."""

    where: str
    content: str | list[dict[str, Any]]

    @property
    def words(self) -> str:
        """The text, without a chat template: that of all messages."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(message.get("content", "")) for message in self.content)


def check_exists(dataset: Dataset) -> None:
    """Raise InputError where the file or folder isn't there, MachineError without ``datasets``."""
    if isinstance(dataset, Path):
        if not dataset.is_file():
            raise _missing(dataset)
        return
    _library()
    if dataset.is_folder and not Path(dataset.hub).is_dir():
        raise _missing(Path(dataset.hub))


def read_dataset(dataset: Dataset) -> tuple[list[Document], str]:
    """The documents of a data set in their order, and its digest.

    Each line of a .jsonl file is an object with ``text``, or with ``messages`` for the chat
    template; any other file is one document of plain text. The digest is the sha256 of the file,
    or that of the documents as JSON lines for a data set of the Hub.

    Raises InputError for what can't be read, is malformed or empty; MachineError without
    ``datasets``, or where the Hub can't be reached.
    """
    if isinstance(dataset, HubDataset):
        return _from_hub(dataset)
    try:
        raw = dataset.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise _missing(dataset) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read as UTF-8 text ({error})", subject=str(dataset)) from error
    if not text.strip():
        raise InputError("is empty", subject=str(dataset), fix="Give it text.")
    if dataset.suffix != ".jsonl":
        documents = [Document(str(dataset), text)]
    else:
        documents = [
            _from_line(line, f"{dataset}:{number}")
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    return documents, hashlib.sha256(raw).hexdigest()


def digest_of(dataset: Dataset) -> str:
    """The digest of a data set, as ``read_dataset`` gives it."""
    if isinstance(dataset, HubDataset):
        return read_dataset(dataset)[1]
    return sha256(dataset)


def _missing(path: Path) -> InputError:
    return InputError(
        "no such file" if path.suffix else "no such file or folder",
        where=str(path),
        fix="Paths in a YAML file are relative to that file.",
    )


def _from_line(line: str, where: str) -> Document:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"isn't valid JSON ({error})", subject=where) from error
    for key, kind in (("text", str), ("messages", list)):
        if isinstance(value, dict) and isinstance(value.get(key), kind):
            return Document(where, value[key])
    raise InputError('isn\'t an object with "text" or "messages"', subject=where)


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise not_installed("datasets", "datasets") from None
    return datasets


def _from_hub(dataset: HubDataset) -> tuple[list[Document], str]:
    values = _column(dataset)
    documents = []
    for number, value in enumerate(values):
        where = f"{dataset} row {number}"
        if not isinstance(value, str | list) or (
            isinstance(value, list) and not all(isinstance(part, dict) for part in value)
        ):
            raise InputError("is neither text nor a list of chat messages", subject=where)
        if value and (isinstance(value, list) or value.strip()):
            documents.append(Document(where, value))
    if not documents:
        raise InputError("is empty", subject=str(dataset), fix="Is it the right split and column?")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document.content, ensure_ascii=False).encode() + b"\n")
    if dataset.join is not None:
        texts = [document.content for document in documents]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("join needs text, and these are messages", where=str(dataset))
        documents = [Document(str(dataset), dataset.join.join(str(text) for text in texts))]
    return documents, digest.hexdigest()


def _column(dataset: HubDataset) -> list[Any]:
    """The values of a data set's column.

    Raises InputError where it can't be loaded, MachineError where the Hub can't be reached.
    """
    library = _library()
    check_exists(dataset)
    library.disable_progress_bars()
    try:
        table = library.load_dataset(
            dataset.hub,
            dataset.config,
            split=dataset.split,
            revision=dataset.revision,
            streaming=dataset.rows is not None,
        )
        columns = list(table.column_names or [])
        values = [row.get(dataset.column) for row in islice(table, dataset.rows)]
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
        raise InputError(
            f"has no column {dataset.column}; it has {', '.join(columns)}", subject=str(dataset)
        )
    return values


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
