"""Whether an engine runs an artifact: in a fresh process it loads it and continues some prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.base.errors import InputError, QuantkitError
from quantkit.base.files import openable
from quantkit.engines import worker


@dataclass(frozen=True)
class Trial:
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
class Answers:
    """ids: the new tokens of each prompt; finite: whether all logits were, None where the engine
    doesn't show them; tokens: of each text."""

    ids: list[list[int]]
    finite: bool | None
    tokens: list[list[int]]


def run_trial(trial: Trial) -> Answers:
    """Run a trial in a process of its own.

    Raises InputError where the engine can't run the artifact or dies of it, MachineError where
    the system killed it.
    """
    try:
        return Answers(**worker.ask(__name__, asdict(trial), trial.engine))
    except worker.WorkerDied as error:  # an engine that aborts can't run the artifact
        raise InputError(error.what, where=error.where) from None


def _llamacpp(trial: Trial) -> Answers:
    from quantkit.engines.llamacpp import LlamaCpp

    with LlamaCpp(Path(trial.path), context=1024) as engine:
        ids = [engine.generate(prompt, trial.new_tokens).ids for prompt in trial.prompts]
        return Answers(ids, None, [engine.tokenize(text) for text in trial.texts])


def _transformers(trial: Trial) -> Answers:
    from transformers import AutoModelForCausalLM

    from quantkit.model.build import class_of

    path = openable(Path(trial.path))
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype="auto", gguf_file=path.name, trust_remote_code=False
        )
    else:
        model = class_of(path).from_pretrained(path, dtype="auto")
    return _by_torch(model.eval(), trial)


def _int4(trial: Trial) -> Answers:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.engines import int4
    from quantkit.formats.packed import PackedCheckpoint

    model, _ = int4.load(PackedCheckpoint(Checkpoint(Path(trial.path))))
    return _by_torch(model, trial)


def _by_torch(model: Any, trial: Trial) -> Answers:
    import torch

    from quantkit.engines import transformers as hf

    prompts = [prompt for prompt in trial.prompts if not isinstance(prompt, str)]
    rows = model.get_input_embeddings().weight.shape[0]
    if (largest := max(id for prompt in prompts for id in prompt)) >= rows:
        raise InputError(f"token {largest} of a prompt is beyond the embedding of {rows} rows")
    finite = True
    with torch.inference_mode():
        for prompt in prompts:
            logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits
            finite = finite and bool(logits.isfinite().all())
    limits = [trial.new_tokens] * len(prompts)
    return Answers(hf.generate(model, prompts, limits, trial.end), finite, [])


def _vllm(trial: Trial) -> Answers:
    import math

    from vllm import LLM, SamplingParams

    model = LLM(trial.path, enforce_eager=True, max_model_len=1024)
    settings = SamplingParams(temperature=0, max_tokens=trial.new_tokens, logprobs=1)
    prompts = [{"prompt_token_ids": prompt} for prompt in trial.prompts]
    made = [answer.outputs[0] for answer in model.generate(prompts, settings)]
    finite = all(
        math.isfinite(value.logprob)
        for out in made
        for step in out.logprobs
        for value in step.values()
    )
    return Answers([list(out.token_ids) for out in made], finite, [])


_ENGINES: dict[str, Callable[[Trial], Answers]] = {
    "llama.cpp": _llamacpp,
    "quantkit-int4": _int4,
    "transformers": _transformers,
    "vllm": _vllm,
}


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    trial = Trial(**job)
    run = _ENGINES[trial.engine]
    try:
        return asdict(run(trial))
    except QuantkitError:
        raise
    except Exception as error:  # whatever an engine raises, it can't run the artifact
        raise InputError(f"can't run it ({type(error).__name__}: {error})") from error


if __name__ == "__main__":
    worker.serve(_answer)
