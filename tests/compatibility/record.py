"""The results: one cell for each artifact and engine, kept as JSON, shown as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

MATCHED, FAILED, NOT_RUN = "matched", "failed", "not run"
_NEVER = "not tried yet"


@dataclass(frozen=True)
class Cell:
    """The result of one artifact in one engine.

    why: the reason where it didn't match. The figures are those of ``prediction.Agreement``.
    """

    status: str
    why: str = ""
    dtype: str = ""
    tolerance: float | None = None
    error: float | None = None
    worst: float | None = None
    tokens: int | None = None
    equal: int | None = None
    ties: int | None = None


@dataclass(frozen=True)
class Setting:
    """What an engine's results depend on besides the artifacts."""

    versions: str
    python: str
    processor: str
    commit: str
    date: str


@dataclass
class Record:
    """All results. cells: by artifact, then by engine. settings: by engine."""

    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    settings: dict[str, Setting] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Record:
        """The results of earlier runs; an empty record where there is no file."""
        if not path.is_file():
            return cls()
        document = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            {
                artifact: {engine: Cell(**cell) for engine, cell in row.items()}
                for artifact, row in document["cells"].items()
            },
            {engine: Setting(**setting) for engine, setting in document["settings"].items()},
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def begin(self, engine: str, setting: Setting) -> None:
        """Set what an engine runs with now, and remove its results with other versions."""
        before = self.settings.get(engine)
        if before is not None and before.versions != setting.versions:
            for row in self.cells.values():
                row.pop(engine, None)
        self.settings[engine] = setting

    def put(self, artifact: str, engine: str, cell: Cell) -> None:
        self.cells.setdefault(artifact, {})[engine] = cell

    def markdown(self, artifacts: Sequence[str], engines: Sequence[str]) -> str:
        """The tables of these artifacts and engines, tried or not."""
        cells = {
            (artifact, engine): self.cells.get(artifact, {}).get(engine, Cell(NOT_RUN, _NEVER))
            for artifact in artifacts
            for engine in engines
        }
        notes: dict[str, int] = {}
        for cell in cells.values():
            if cell.why:
                notes.setdefault(cell.why, len(notes) + 1)

        def shown(cell: Cell) -> str:
            status = f"**{cell.status}**" if cell.status == FAILED else cell.status
            return f"{status} ({notes[cell.why]})" if cell.why else status

        lines = [
            f"| artifact | {' | '.join(engines)} |",
            f"|---|{'---|' * len(engines)}",
            *(
                f"| `{artifact}` | {' | '.join(shown(cells[artifact, e]) for e in engines)} |"
                for artifact in artifacts
            ),
            "",
            *(f"{number}. {why}" for why, number in notes.items()),
            "",
            "## Figures",
            "",
            "| artifact | engine | dtype | error | worst place | tolerance | tokens equal |",
            "|---|---|---|--:|--:|--:|--:|",
            *(
                _figures(artifact, engine, cell)
                for (artifact, engine), cell in cells.items()
                if cell.error is not None
            ),
            "",
            "## Versions",
            "",
            "| engine | versions | Python | processor | quantkit | date |",
            "|---|---|---|---|---|---|",
            *(
                f"| {engine} | {it.versions} | {it.python} | {it.processor} | {it.commit} "
                f"| {it.date} |"
                for engine in engines
                if (it := self.settings.get(engine))
            ),
        ]
        return "\n".join(lines) + "\n"


def _figures(artifact: str, engine: str, cell: Cell) -> str:
    tokens = f"{cell.equal} of {cell.tokens}"
    if cell.ties:
        tokens += f", {cell.ties} tie{'s' if cell.ties > 1 else ''}"
    return (
        f"| `{artifact}` | {engine} | {cell.dtype} | {cell.error:.3%} | {cell.worst:.3%} "
        f"| {cell.tolerance:.0%} | {tokens} |"
    )
