"""What engines compute from the artifacts of the demo model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.base.resources import demo_model
from quantkit.checkpoint.end_tokens import end_tokens
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines import int4
from quantkit.engines import transformers as hf
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.judging.answers import Answer
from quantkit.judging.cases import encode_prompt, load_cases
from quantkit.judging.regression import judge_answers
from quantkit.methods.grids import QuantizedTensor
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.suite import load_suite
from tests.helpers.present import present

CPU = torch.device("cpu")


def test_nf4_loads_with_plain_transformers_and_answers(artifacts: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifacts["nf4"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifacts["nf4"])
    suite = load_suite("demo")
    cases = load_cases(suite.resolve(present(suite.suite.regression).cases))[:12]
    prompts = [encode_prompt(case, tokenizer) for case in cases]
    end = end_tokens(artifacts["nf4"], tokenizer)
    made = hf.generate(model, prompts, [case.max_new_tokens for case in cases], end)
    answers = [Answer(tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]
    assert judge_answers(cases, answers, answers).passed >= 10


@pytest.mark.engine
def test_the_gguf_in_llamacpp_gives_the_same_tokens(artifacts: dict[str, Path]) -> None:
    """Over all prompts of the suite, against transformers on the unpacked weights."""
    from quantkit.engines.llamacpp import LlamaCpp

    directory = artifacts["gguf-q4-k-m"]
    (path,) = directory.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    suite = load_suite("demo")
    cases = load_cases(suite.resolve(present(suite.suite.regression).cases))
    prompts = [encode_prompt(case, tokenizer) for case in cases]
    limits = [case.max_new_tokens for case in cases]
    end = end_tokens(directory, tokenizer)
    stream = Stream(
        Skeleton(Checkpoint(demo_model()), torch.float32), open_artifact(directory), CPU
    )
    with stream.whole() as model:
        theirs = hf.generate(model, prompts, limits, end)
    with LlamaCpp(path, threads=1) as engine:
        ours = [engine.generate(p, n).ids for p, n in zip(prompts, limits, strict=True)]
    same = sum(
        [token for token in mine if token not in end] == other
        for mine, other in zip(ours, theirs, strict=True)
    )
    assert same >= 0.9 * len(cases)


@pytest.mark.parametrize(
    "name", ["awq-w4-g128", "gptq-w4-g128", "ct-w4a16-g128", "ct-awq-w4a16-g128"]
)
def test_packed_linears_compute_what_was_judged(artifacts: dict[str, Path], name: str) -> None:
    source = PackedCheckpoint(Checkpoint(artifacts[name]))
    model, engine = int4.load(source)
    assert engine == "quantkit-int4"
    linears = {n: m for n, m in model.named_modules() if isinstance(m, int4.Int4Linear)}
    assert len(linears) == 28
    for module_name, linear in linears.items():
        tensor = source.read_quantized(f"{module_name}.weight")
        assert isinstance(tensor, QuantizedTensor)
        x = torch.randn(3, linear.in_features).to(torch.bfloat16)
        expected = x.float() @ tensor.dequantize().t()
        error = (linear(x).float() - expected).norm() / expected.norm()
        assert error < 0.02, module_name


def test_answers_do_not_depend_on_what_shares_the_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [9, 8, 7, 6], [5, 6, 7], [20, 21, 22]]
    run = partial(hf.generate, model, end=[])
    together = run(prompts, [6] * 4)
    alone = [run([prompt], [6])[0] for prompt in prompts]
    assert together == alone and together[0] == together[2]
