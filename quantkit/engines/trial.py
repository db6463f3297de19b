"""One engine in one fresh process: load, continue some prompts greedily, tell what came out.

Run by ``verify.py`` as ``python -m quantkit.engines.trial``, with a request as JSON on stdin. An
engine that aborts takes only this process with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError, MachineError, QuantkitError


@dataclass(frozen=True)
class Request:
    """What an engine is asked: to continue ``prompts``, and (llama.cpp) to tokenize ``texts``.

    ``prompts`` are token ids, or (llama.cpp) text; ``end``: the tokens that end an answer.
    """

    path: str
    engine: str
    prompts: tuple[list[int] | str, ...]
    new_tokens: int
    end: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of it. ids: the new tokens of each prompt; finite: whether all logits were, None
    where the engine doesn't show them; tokens: of each text."""

    ids: list[list[int]]
    finite: bool | None
    tokens: list[list[int]]


def attempt(request: Request) -> Outcome:
    """Run a request in a process of its own.

    Raises InputError where the engine can't run the artifact or dies of it, MachineError where
    the system killed it.
    """
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "quantkit.engines.trial"],
        input=json.dumps(asdict(request)),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        raise MachineError(
            "its process was killed, perhaps for want of memory",
            where=request.engine,
            fix="Use a machine with more memory.",
        )
    if done.returncode != 0 or not done.stdout:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise InputError(
            f"its process ended with code {done.returncode}: {said[-1]}", where=request.engine
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise InputError(answer["error"], where=request.engine)
    return Outcome(**answer)


def _llamacpp(request: Request) -> Outcome:
    from quantkit.engines.llamacpp import LlamaCpp

    with LlamaCpp(Path(request.path), context=1024) as engine:
        ids = [engine.generate(prompt, request.new_tokens).ids for prompt in request.prompts]
        return Outcome(ids, None, [engine.tokenize(text) for text in request.texts])


def _transformers(request: Request) -> Outcome:
    from transformers import AutoModelForCausalLM

    path = Path(request.path)
    named = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if named else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **named).eval()
    return _by_torch(model, request)


def _int4(request: Request) -> Outcome:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.engines import int4
    from quantkit.formats.packed import PackedCheckpoint

    model, _ = int4.load(PackedCheckpoint(Checkpoint(Path(request.path))))
    return _by_torch(model, request)


def _by_torch(model: Any, request: Request) -> Outcome:
    import torch

    from quantkit.engines import transformers as hf

    prompts = [prompt for prompt in request.prompts if not isinstance(prompt, str)]
    finite = True
    with torch.inference_mode():
        for prompt in prompts:
            logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits
            finite = finite and bool(logits.isfinite().all())
    limits = [request.new_tokens] * len(prompts)
    return Outcome(hf.generate(model, prompts, limits, request.end), finite, [])


def _vllm(request: Request) -> Outcome:
    import math

    from vllm import LLM, SamplingParams

    model = LLM(request.path, enforce_eager=True, max_model_len=1024)
    settings = SamplingParams(temperature=0, max_tokens=request.new_tokens, logprobs=1)
    prompts = [{"prompt_token_ids": prompt} for prompt in request.prompts]
    made = [answer.outputs[0] for answer in model.generate(prompts, settings)]
    finite = all(
        math.isfinite(value.logprob)
        for out in made
        for step in out.logprobs
        for value in step.values()
    )
    return Outcome([list(out.token_ids) for out in made], finite, [])


_ENGINES: dict[str, Callable[[Request], Outcome]] = {
    "llama.cpp": _llamacpp,
    "quantkit-int4": _int4,
    "transformers": _transformers,
    "vllm": _vllm,
}


def main() -> None:
    """Answer the request on stdin; stdout gets the answer and nothing else."""
    result = os.dup(1)
    os.dup2(2, 1)
    request = Request(**json.loads(sys.stdin.read()))
    answer: dict[str, Any]
    run = _ENGINES[request.engine]
    try:
        answer = asdict(run(request))
    except QuantkitError as error:
        answer = {"error": str(error)}
    except Exception as error:  # whatever an engine raises, it can't run the artifact
        answer = {"error": f"can't run it ({type(error).__name__}: {error})"}
    with os.fdopen(result, "w") as stdout:
        stdout.write(json.dumps(answer))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
