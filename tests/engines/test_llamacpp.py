"""llama.cpp runs what is written, and agrees with transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.base.errors import InputError, MachineError
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.engines.llamacpp import LlamaCpp
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.mixes import MIXES
from quantkit.formats.gguf.writer import write_bf16, write_file
from tests.helpers.gguf_tiny import GPT2, LLAMA3, MODELS, QWEN2, TEXT, VOCABULARY, checkpoint

pytestmark = pytest.mark.engine
needs_engine = pytest.mark.usefixtures("_engine")

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, changes) for name, changes in MODELS.items()},
    "qwen2 with yarn": ("qwen2", {"rope_parameters": ROPES["yarn"]}),
    "granite with llama3": ("granite", {**MODELS["granite"], "rope_parameters": ROPES["llama3"]}),
    "phi3 with longrope": (
        "phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 64,
                "long_factor": [1.0 + index / 8 for index in range(24)],
                "short_factor": [1.0 + index / 64 for index in range(24)],
            },
        },
    ),
    "gemma3 with linear": (
        "gemma3_text",
        {
            **MODELS["gemma3_text"],
            "rope_parameters": {
                "full_attention": ROPES["linear"],
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
            },
        },
    ),
    "olmo3 with yarn": (
        "olmo3",
        {
            **MODELS["olmo3"],
            "rope_parameters": {
                "full_attention": {**ROPES["yarn"], "attention_factor": 1.3},
                "sliding_attention": ROPES["yarn"] | {"rope_type": "default"},
            },
        },
    ),
    "parallel stablelm": ("stablelm", {"use_parallel_residual": True}),
    "qwen3_vl": ("qwen3_vl", {}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}),
    "smolvlm": ("smolvlm", {}),
    "granitemoehybrid without rope": (
        "granitemoehybrid",
        {
            **MODELS["granitemoehybrid"],
            "position_embedding_type": "nope",
            "embedding_multiplier": 3.0,
        },
    ),
    "serial gpt_neox": ("gpt_neox", {**MODELS["gpt_neox"], "use_parallel_residual": False}),
}


@pytest.fixture(scope="module")
def _engine() -> None:
    pytest.importorskip("xllamacpp")


def write_f32(directory: Path) -> Path:
    """A GGUF with every tensor in F32: what llama.cpp computes from it is as exact as can be."""
    source = Checkpoint(directory)
    path = directory / "f32.gguf"
    write_file(path, plan_file(source, "f32"), source)
    return path


def agreement(directory: Path, path: Path, margin: float = 0.0) -> float:
    """The share of transformers' greedy steps (float32) at which llama.cpp takes the same token.

    Both continue the same ids at every step. Steps at which the two best logits of transformers
    are within ``margin`` are left out: llama.cpp keeps keys and values in F16.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wraps = "vision_config" in (directory / "config.json").read_text()
    kind = AutoModelForImageTextToText if wraps else AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCABULARY - 40, (2, 80), generator=generator)
    same = []
    with LlamaCpp(path, threads=1, context=256) as engine:
        for prompt in prompts:
            settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 1}
            rows = model.generate(prompt[None], **settings)[0]
            logits = model(rows[None]).logits[0]
            best = logits.topk(2)
            for step in range(len(prompt), len(rows)):
                first, second = best.values[step - 1]
                if first - second > margin:
                    ids = engine.generate(rows[:step].tolist(), 1).ids
                    same.append(ids == best.indices[step - 1, :1].tolist())
    assert len(same) > 20
    return sum(same) / len(same)


@needs_engine
@pytest.mark.parametrize("rope", ROPES)
def test_greedy_ids_equal_transformers(tmp_path: Path, rope: str) -> None:
    model_type = "mistral" if rope == "default" else "llama"
    bias: dict[str, Any] = {}
    if model_type != "mistral":
        bias = {"attention_bias": True, "mlp_bias": True}
    directory = checkpoint(
        tmp_path,
        dtype=torch.float32,
        model_type=model_type,
        rope_parameters=ROPES[rope],
        tie_word_embeddings=rope == "linear",
        **bias,
    )
    assert agreement(directory, write_f32(directory), margin=0.05) == 1.0


@needs_engine
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_answers_as_transformers(tmp_path: Path, variant: str) -> None:
    model_type, changes = VARIANTS[variant]
    directory = checkpoint(tmp_path, dtype=torch.float32, model_type=model_type, **changes)
    assert agreement(directory, write_f32(directory), margin=0.05) == 1.0


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("small"), num_hidden_layers=2)


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_runs(small: Path, tmp_path: Path, mix: str) -> None:
    source = Checkpoint(small)
    plan = plan_file(source, mix, imatrix=True)
    importance = {
        tensor.key: torch.rand(tensor.shape[-1]) + 0.1
        for tensor in plan.tensors
        if tensor.key and tensor.name.startswith("blk.") and len(tensor.shape) > 1
    }
    write_file(tmp_path / "model.gguf", plan, source, importance.get)
    with LlamaCpp(tmp_path / "model.gguf", threads=1, context=64) as engine:
        assert len(engine.generate(list(range(10, 30)), 8).ids) > 0


@needs_engine
def test_bf16_agrees_with_transformers(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path)
    write_bf16(tmp_path / "bf16.gguf", Checkpoint(directory))
    assert agreement(directory, tmp_path / "bf16.gguf") >= 0.9


@needs_engine
@pytest.mark.skipif(not demo_model().is_dir(), reason="the demo model isn't here")
def test_the_demo_model_answers_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    write_bf16(tmp_path / "demo.gguf", Checkpoint(directory))
    equal = total = 0
    with LlamaCpp(tmp_path / "demo.gguf", threads=1, context=256) as engine:
        for question in ("Who are you?", "Write one sentence about the sea.", "Sort 3, 1, 2."):
            chat = [{"role": "user", "content": question}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.encode(text)
            expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
            answer = engine.generate(text, 24).ids
            assert engine.tokenize(text) == ids
            equal += sum(a == b for a, b in zip(answer, expected[0, len(ids) :], strict=False))
            total += max(len(answer), expected.shape[1] - len(ids))
    assert equal >= 0.9 * total


@needs_engine
@pytest.mark.parametrize(
    "split", [GPT2, QWEN2, LLAMA3, None], ids=["gpt-2", "qwen2", "llama3", "sentencepiece"]
)
@pytest.mark.parametrize("bos", [False, True])
def test_llama_cpp_tokenizes_alike(tmp_path: Path, split: str | None, bos: bool) -> None:
    from tokenizers import Tokenizer

    directory = checkpoint(tmp_path, num_hidden_layers=1, split=split, bos=bos)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    write_bf16(tmp_path / "bf16.gguf", Checkpoint(directory))
    with LlamaCpp(tmp_path / "bf16.gguf", threads=1, context=256) as engine:
        for text in [*TEXT, "don't</s>mind  it\n\n at all 1998"]:
            ids = tokenizer.encode(text).ids
            assert engine.tokenize(text) == ids
            by_text = engine.generate(text, 12)
            assert by_text.prompt_tokens == len(ids)
            assert by_text == engine.generate(ids, 12)


@needs_engine
def test_log_probabilities_are_of_the_whole_vocabulary(small: Path) -> None:
    from transformers import AutoModelForCausalLM

    prompt = list(range(10, 30))
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    write_bf16(small / "bf16.gguf", Checkpoint(small))
    with LlamaCpp(small / "bf16.gguf", threads=1, context=64) as engine:
        given = torch.tensor(engine.log_probabilities(prompt))
        assert engine.generate(prompt, 1).ids == [int(given.argmax())]
    assert given.shape == expected.shape
    assert torch.allclose(given, expected, atol=0.05)


@needs_engine
def test_timings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    directory = checkpoint(tmp_path, num_hidden_layers=1)
    write_bf16(tmp_path / "bf16.gguf", Checkpoint(directory))
    with LlamaCpp(tmp_path / "bf16.gguf", threads=1, context=128, parallel=8) as engine:
        prompts = [[3 + row, *range(10, 30)] for row in range(8)]
        one, eight = engine.measure(prompts[:1], 16), engine.measure(prompts, 16)
        with pytest.raises(InputError, match="context"):
            engine.generate(list(range(3, 403)), 4)
        with pytest.raises(InputError, match="context"):
            engine.measure([list(range(3, 403))], 4)
        with pytest.raises(InputError, match="8 slots"):
            engine.measure(prompts * 2, 16)
        with pytest.raises(InputError, match="two new tokens"):
            engine.measure(prompts, 1)
    assert (one.requests, one.prompt_tokens, one.new_tokens) == (1, 21, 16)
    assert (eight.requests, eight.prompt_tokens, eight.new_tokens) == (8, 168, 128)
    for timing in (one, eight):
        assert min(timing.first_token_seconds, timing.prefill_rate, timing.decode_rate) > 0
    assert capfd.readouterr().out == ""


@needs_engine
def test_files_that_do_not_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no such file"):
        LlamaCpp(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="can't load"):
        LlamaCpp(tmp_path / "bad.gguf")
    assert capfd.readouterr().out == ""


def test_without_xllamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MachineError, match="isn't installed"):
        LlamaCpp(tmp_path / "model.gguf")
