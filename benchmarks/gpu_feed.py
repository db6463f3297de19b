"""The model and the calibration rows of ``benchmarks.gpu``, made in a process of its own.

    python -m benchmarks.gpu_feed SHAPE FOLDER --samples 128 --sequence-length 2048 --device cuda

makes in FOLDER ``model`` (as benchmarks/models.py does, its weights drawn on the device),
``calibration.jsonl`` (documents of words of the bundled texts, drawn by chance as often as they
occur, because those texts are too short) and ``rows.json``: the token ids that every recipe of ours
draws from that text, for a tool that takes ids. Parts that are there already are kept.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from benchmarks.models import SHAPES, documents, missing, write_json, write_model, write_tokenizer

SEED, BOS = 0, True  # of the calibration of our recipes
WORDS = 1000  # in a document


def make(
    shape: str, folder: Path, *, samples: int, sequence_length: int, device: str = "cpu"
) -> Path:
    """Make everything for one shape; returns the folder."""
    with missing(folder / "model") as directory:
        if directory is not None:
            write_model(directory, SHAPES[shape], device)
            write_tokenizer(directory, SHAPES[shape].vocabulary)
    if not (folder / "rows.json").is_file():
        write_text(folder / "calibration.jsonl", samples * sequence_length)
        write_rows(folder, samples, sequence_length)
    return folder


def write_text(path: Path, words: int) -> None:
    """Write as many words and some more: a word is at least one token."""
    choose = random.Random(SEED)
    known = [word for text in documents() for word in text.split()]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(words // WORDS + 1):
            text = " ".join(choose.choices(known, k=WORDS))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def write_rows(folder: Path, samples: int, sequence_length: int) -> None:
    """Write the rows that our recipes draw from the text, as token ids."""
    from quantkit.calibration.text import load_tokenizer, pack_rows

    rows = pack_rows(
        folder / "calibration.jsonl",
        load_tokenizer(folder / "model"),
        sequence_length=sequence_length,
        rows=samples,
        seed=SEED,
        bos=BOS,
    )
    if rows.count < samples:
        raise SystemExit(f"the text fills only {rows.count} of {samples} rows")
    write_json(folder / "rows.json", rows.ids.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = vars(parser.parse_args())
    make(given.pop("shape"), given.pop("folder"), **given)


if __name__ == "__main__":
    main()
