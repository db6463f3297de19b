"""Text from a file or a data set of the Hub, pinned so that it is the same for everyone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from quantkit.base.errors import InputError
from quantkit.base.files import sha256
from quantkit.documents.hub import HubDataset, library, read_column
from quantkit.documents.text import check_text

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

    def __post_init__(self) -> None:
        """Raises InputError for messages that aren't objects, and for halves of characters."""
        if isinstance(self.content, list):
            odd = [value for value in self.content if not isinstance(value, dict)]
            if odd:
                raise InputError(
                    f"messages holds {json.dumps(odd[0])}, which is no object",
                    where=self.where,
                    fix='Write each message as {"role": "user", "content": "…"}.',
                )
        check_text(self.content, self.where)

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
    library()
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


def _from_hub(dataset: HubDataset) -> tuple[list[Document], str]:
    check_exists(dataset)
    values = read_column(dataset)
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
