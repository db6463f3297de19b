"""Docstrings are split by file, always alike."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import trained


def test_a_file_belongs_to_one_text_always() -> None:
    names = [f"torch/file{number}.py" for number in range(4000)]
    counts = Counter(map(trained.part, names))
    assert counts == Counter(map(trained.part, names))
    assert set(counts) == {"training", "calibration", "heldout"}
    for name in ("calibration", "heldout"):
        assert counts[name] == pytest.approx(len(names) / trained.HELD, rel=0.25)


def test_docstrings_are_long_enough_and_none_is_of_a_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("Some words about it. " * trained.SHORTEST).strip()
    files = {
        "a.py": f'"""{text}"""\ndef f():\n    """Short."""\nclass C:\n    """C. {text}"""\n',
        "test_a.py": f'"""{text}"""\n',
        "broken.py": f'"""{text}"""\ndef\n',
        "site-packages/b.py": f'"""{text}"""\n',
    }
    for name, content in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr(trained, "PACKAGES", ())
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    assert list(trained.docstrings()) == [("lib/a.py", text), ("lib/a.py", f"C. {text}")]


def test_the_tokenizer_gives_text_back() -> None:
    tokenizer = trained.build_tokenizer(["def f(x):\n    return x\n", "naïve café"] * 20)
    text = "def g(naïve):\n    return café"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == trained.END and tokenizer(trained.END)["input_ids"] == [0]
