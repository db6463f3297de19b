"""Runs of the command line on damaged files, and what must hold of each of them."""

from __future__ import annotations

import gc
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from safetensors.torch import load_file, save_file

from quantkit.base.resources import demo_model
from quantkit.cli import main
from tests.helpers.suite import write_suite
from tests.helpers.tiny import build

SECONDS = "QUANTKIT_FUZZ_SECONDS"  # for each kind of file; unset: a fixed number of examples
SEED = "QUANTKIT_FUZZ_SEED"
_ANSWERS = {0, 1, 2, 3, 4}  # exit codes; 70 is a bug of ours
_LONGEST = 30  # seconds that a command may take for models of this size
_HEADROOM = 8 << 30  # bytes: what asks for more gets an error on every machine
_ROUND = 40  # examples between two looks at the clock
_SHAPE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": 4,
    "pad_token_id": 0,
}
RTN = """schema: 1
name: rtn
version: 1.0.0
quantize: {method: rtn, bits: 4, group_size: 32, symmetric: false, format: gptq}
"""
Drawn = TypeVar("Drawn")


class TooSlow(BaseException):
    """A command hangs. No Exception, or the command line would catch it."""


class Sources:
    """Files of every kind, undamaged: model, shards, adapter, artifact, gguf, suite, recipe.yaml.

    ``with_changed`` gives a copy of one of them in which one file is another.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self._work = place / "work"
        self.model = build("llama", place / "model", dtype=torch.bfloat16, **_SHAPE)
        for path in demo_model().iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copy(path, self.model)
        self.shards = self._sharded()
        self.adapter = self._adapter()
        self.recipe = place / "recipe.yaml"
        self.recipe.write_text(RTN)
        self.artifact = self._made(self.recipe, "artifact")
        self.gguf = self._made("gguf-q8-0", "gguf")
        (place / "suite").mkdir()
        cases = [{"id": "owl", "prompt": "The owl is", "check": {"contains": "white"}}]
        self.suite = write_suite(
            place / "suite", cases, gates=[{"metric": "kl_divergence.mean", "max": 0.1}]
        ).parent

    def with_changed(self, source: Path, name: str, data: bytes) -> Path:
        """A fresh copy of the directory ``source`` in which the file ``name`` holds ``data``."""
        shutil.rmtree(self._work, ignore_errors=True)
        copy = self._work / source.name
        copy.mkdir(parents=True)
        for path in source.iterdir():
            if path.name != name:
                os.link(path, copy / path.name)
        (copy / name).write_bytes(data)
        return copy

    def out(self) -> Path:
        return self._work / "out"

    def _sharded(self) -> Path:
        directory = self.place / "shards"
        shutil.copytree(self.model, directory)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        keys = sorted(tensors)
        mapping: dict[str, str] = {}
        for number, part in enumerate((keys[:4], keys[4:]), 1):
            name = f"model-0000{number}-of-00002.safetensors"
            save_file({key: tensors[key] for key in part}, directory / name)
            mapping |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": mapping}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    def _adapter(self) -> Path:
        directory = self.place / "adapter"
        directory.mkdir()
        config = {
            **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4},
            **{"target_modules": ["q_proj"], "bias": "none", "use_rslora": False},
            **{"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None},
            "base_model_name_or_path": "base",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        name = "base_model.model.model.layers.0.self_attn.q_proj"
        factors = {
            f"{name}.lora_A.weight": torch.full((2, 64), 0.01),
            f"{name}.lora_B.weight": torch.full((64, 2), 0.01),
        }
        save_file(factors, directory / "adapter_model.safetensors")
        return directory

    def _made(self, recipe: object, name: str) -> Path:
        code, printed = quantkit(
            "quantize", recipe, "--model", self.model, "--out", self.place / name
        )
        assert code == 0, printed
        return self.place / name


def answers(*arguments: object, out: Path | None = None) -> int:
    """Run a command that may refuse its files, but mustn't crash; returns its exit code.

    out: the directory that it makes: whole where it says so, and else not there at all.
    """
    with _bounded(), warnings.catch_warnings(action="ignore"):
        code, printed = quantkit(*arguments)
    shown = f"quantkit {' '.join(map(str, arguments))}\n{printed}"
    assert code in _ANSWERS, shown
    assert "Traceback" not in printed, shown
    if code in (2, 3):
        assert "error:" in printed.lower() or "problem:" in printed, shown
    if out is not None and code != 0:
        assert not list(out.parent.glob(f"{out.name}*")), f"{shown}\nhalf-written"
    if out is not None and code == 0 and out.exists():
        assert quantkit("inspect", out)[0] == 0, shown
    return code


def quantkit(*arguments: object) -> tuple[int, str]:
    """The exit code of ``quantkit`` with these arguments, and what it prints, in this process."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["quantkit", *map(str, arguments)])
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", printed)
        try:
            main()
        except SystemExit as end:
            code = end.code
        finally:
            gc.unfreeze()
    assert isinstance(code, int)
    printed.seek(0)
    return code, printed.read()


def fuzz(drawn: SearchStrategy[Drawn], attempt: Callable[[Drawn], None], examples: int) -> None:
    """Make ``attempt`` on what is drawn: ``examples`` times, always the same, or until time is up.

    With ``QUANTKIT_FUZZ_SECONDS`` the examples begin with ``QUANTKIT_FUZZ_SEED``.
    """
    always = settings(
        deadline=None,
        database=None,
        derandomize=True,
        max_examples=examples,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    if SECONDS not in os.environ:
        always(given(drawn)(attempt))()
        return
    ends = time.monotonic() + float(os.environ[SECONDS])
    number, done = int(os.environ[SEED]), 0
    while time.monotonic() < ends:
        once = settings(always, derandomize=False, max_examples=_ROUND)
        seed(number + done)(once(given(drawn)(attempt)))()
        done += 1


@contextmanager
def _bounded() -> Iterator[None]:
    """End a command that hangs, and refuse it memory that not every machine has."""

    def too_slow(*_: object) -> None:
        raise TooSlow(f"more than {_LONGEST} seconds")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(_LONGEST)
    resource.setrlimit(resource.RLIMIT_AS, (used + _HEADROOM, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)
