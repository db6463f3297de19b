"""Text from a file or a data set of the Hub, pinned so that it is the same for everyone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from quantkit.base.errors import InputError
from quantkit.documents.content import (
    check_readable,
    digest_of_file,
    locate_file,
    missing_file,
)
from quantkit.documents.forms import Form, Message, form_of
from quantkit.documents.hub import HubDataset, library, read_column
from quantkit.documents.records import counted, first_line, listed, read_records
from quantkit.documents.text import check_text

_FORMS = "docs/recipes.md has the forms of texts that are read."

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
    return locate_file(dataset, directory)


@dataclass(frozen=True)
class Document:
    """One document of a data set: text, or chat messages.

    where: its file and line, or its row; plain: the text to take for messages where the model has
    no chat template, None where it needs one; tools: that may be called in the messages.
    """

    where: str
    content: str | list[Message]
    plain: str | None = None
    tools: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Raises InputError for halves of characters."""
        check_text(self.content, self.where)
        check_text(self.tools, self.where)

    @property
    def words(self) -> str:
        """The text, without a chat template: that of all messages."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(str(message.get("content", "")) for message in self.content)


@dataclass(frozen=True)
class Texts:
    """The documents of a data set in their order.

    digest: of the data set; found: in which shape they were, and how many were blank and dropped,
    in words for people.
    """

    documents: list[Document]
    digest: str
    found: str


def check_exists(dataset: Dataset) -> None:
    """Raise InputError where the file or folder isn't there, MachineError without ``datasets``."""
    if isinstance(dataset, Path):
        check_readable(dataset)
        return
    library()
    if dataset.is_folder and not Path(dataset.hub).is_dir():
        raise missing_file(Path(dataset.hub))


def read_dataset(dataset: Dataset) -> Texts:
    """The documents of a data set. Blank ones are dropped.

    The content of a file decides its shape (see ``read_records``), and each record's keys its form
    (see ``form_of``); plain text is one document. The digest is the sha256 of the file, or that of
    the documents as JSON lines for a data set of the Hub.

    Raises InputError for what can't be read, is malformed or empty; MachineError without
    ``datasets``, or where the Hub can't be reached.
    """
    if isinstance(dataset, HubDataset):
        return _from_hub(dataset)
    found = read_records(dataset)
    name = dataset.name if dataset.is_file() else str(dataset)  # a pipe's last part says nothing
    if found.text is not None:
        document = Document(str(dataset), found.text)
        return Texts([document], found.digest, f"{name}: {found.shape}, 1 document")
    found.check()
    records = [(record.where, record.value) for record in found.records]
    documents, what = _documents(records, str(dataset))
    return Texts(documents, found.digest, f"{name}: {found.shape}, {what}")


def digest_of(dataset: Dataset) -> str:
    """The digest of a data set, as ``read_dataset`` gives it."""
    if isinstance(dataset, HubDataset):
        return read_dataset(dataset).digest
    return digest_of_file(dataset)


def _documents(
    records: Iterable[tuple[str, Any]], name: str, fix: str | None = None
) -> tuple[list[Document], str]:
    """The documents that records hold, each given with its place, and what was found, in words.

    name: of the data set. Raises InputError where a record can't be used, or none holds text.
    """
    forms: list[tuple[str, Form]] = []
    problems: list[tuple[str, str]] = []
    begin: Any = None
    for number, (where, value) in enumerate(records):
        begin = value if number == 0 else begin
        try:
            forms.append((where, form_of(value)))
        except ValueError as error:
            problems.append((where, str(error)))
    if problems and not forms:
        where, why = problems[0]
        shown = first_line(json.dumps(begin, ensure_ascii=False, default=str))
        raise InputError(
            f"{why}; nothing in it can be used, and it begins with {shown}", where=where, fix=_FORMS
        )
    if problems:
        raise listed(problems, _FORMS)
    kept = [(where, form) for where, form in forms if not form.is_blank]
    if not kept:
        what = "holds only blank records" if forms else "is empty"
        raise InputError(what, subject=name, fix=fix or "Give it text.")
    kinds = Counter(form.kind for _, form in kept)
    parts = [f"{count:,} of {kind}" for kind, count in kinds.most_common()]
    one = counted(len(kept), "document")
    what = f"{one} of {kept[0][1].kind}" if len(kinds) == 1 else f"{one} ({', '.join(parts)})"
    if blank := len(forms) - len(kept):
        what += f"; {counted(blank, 'blank one')} dropped"
    documents = [Document(where, form.content, form.plain, form.tools) for where, form in kept]
    return documents, what


def _from_hub(dataset: HubDataset) -> Texts:
    check_exists(dataset)
    # A row without a text is a blank one.
    values = ["" if value is None else value for value in read_column(dataset)]
    for number, value in enumerate(values):
        if not isinstance(value, str | list | dict):
            raise InputError(
                "is neither text nor a list of chat messages", subject=f"{dataset} row {number}"
            )
    records = [(f"{dataset} row {number}", value) for number, value in enumerate(values)]
    documents, found = _documents(records, str(dataset), "Is it the right split and column?")
    digest = hashlib.sha256()
    for value in values:
        if value and (isinstance(value, list | dict) or value.strip()):
            text = json.dumps(value, ensure_ascii=False, default=str)
            digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    if dataset.join is not None:
        texts = [document.content for document in documents]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("join needs text, and these are messages", where=str(dataset))
        documents = [Document(str(dataset), dataset.join.join(str(text) for text in texts))]
        found += ", joined to one"
    return Texts(documents, digest.hexdigest(), f"{dataset}: {found}")
