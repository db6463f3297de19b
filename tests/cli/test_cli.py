"""The command line as a new user meets it: help, JSON, and every mistake named."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.base.resources import demo_model
from quantkit.base.version import __version__
from tests.helpers.cli import refused, run
from tests.helpers.tiny import Tiny

QUANTKIT = str(Path(sys.executable).with_name("quantkit"))


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of the demo to harm."""
    return Path(shutil.copytree(demo_model(), tmp_path / "model"))


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        done = subprocess.run([QUANTKIT, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.5
    for word in ("quantize", "eval", "bench", "compare", "recipes", "130 interrupted"):
        assert word in done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, quantkit.cli; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version").stdout.strip() == __version__


def test_recipes_are_listed_and_shown() -> None:
    listed = json.loads(run("recipes", "list", "--json").stdout)
    assert "awq-w4-g128" in {recipe["name"] for recipe in listed}
    shown = run("recipes", "show", "awq-w4-g128").stdout
    assert "group_size: 128" in shown and "# digest: " in shown


def test_a_dry_run_shows_schemes_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("quantize", "gptq-w4-g128", "--model", "demo", "--dry-run", "--json")
    plan = json.loads(result.stdout)
    schemes = {group["name"]: group["scheme"] for group in plan["groups"]}
    assert schemes["model.layers.*.mlp.down_proj.weight"] == "int4 g128 sym"
    assert schemes["model.norm.weight"] == "bfloat16"
    assert 4 < plan["bits_per_weight"]["quantized"] < plan["bits_per_weight"]["file"] < 8
    table = run("quantize", "gguf-q4-k-m", "--model", "demo", "--dry-run").stdout
    assert "Q4_K" in table and "Q6_K" in table
    assert list(tmp_path.iterdir()) == []


def test_a_misspelt_recipe_key(tmp_path: Path) -> None:
    recipe = tmp_path / "my.yaml"
    recipe.write_text(
        "schema: 1\nname: my\nversion: 1.0.0\n"
        "quantize: {method: rtn, bits: 4, groupsize: 128, symmetric: false, format: awq}\n"
    )
    message = refused(2, "quantize", recipe, "--model", "demo", "--out", tmp_path / "out")
    assert "my.yaml: quantize.group_size is missing" in message
    assert "quantize.groupsize: unknown key; did you mean group_size?" in message
    assert not (tmp_path / "out").exists()


def test_a_wrong_type(tmp_path: Path) -> None:
    message = refused(
        2, "quantize", "rtn-w4-g128", "-m", "demo", "-o", tmp_path / "o", "--set", "quantize.bits=x"
    )
    assert "quantize.bits: input should be a valid integer, not 'x'" in message


def test_a_missing_model(tmp_path: Path) -> None:
    message = refused(2, "quantize", "nf4", "--model", "./nowhere", "--out", tmp_path / "out")
    assert "./nowhere: no such directory" in message and "demo" in message


def test_a_truncated_checkpoint(broken: Path, tmp_path: Path) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = refused(2, "quantize", "nf4", "--model", broken, "--out", tmp_path / "out")
    assert "model.safetensors: the file is truncated" in message and "copy it again" in message


def test_a_pickled_checkpoint(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    message = refused(2, "quantize", "nf4", "--model", broken, "--out", tmp_path / "out")
    assert "only as pickle (pytorch_model.bin)" in message and "save_pretrained" in message


def test_a_checkpoint_with_a_tensor_too_few_or_too_many(broken: Path, tmp_path: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    spare = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, broken / "model.safetensors")
    message = refused(2, "quantize", "nf4", "--model", broken, "--out", tmp_path / "out")
    assert "lacks model.layers.1.mlp.up_proj.weight" in message
    weights["model.layers.1.mlp.up_proj.weight"] = spare
    weights["model.layers.9.surprise"] = torch.zeros(2)
    save_file(weights, broken / "model.safetensors")
    message = refused(2, "quantize", "nf4", "--model", broken, "--out", tmp_path / "out")
    assert "holds model.layers.9.surprise, which the model doesn't have" in message


@pytest.mark.parametrize("recipe", ["rtn-w4-g128", "gptq-w4-g128", "gguf-q8-0", "nf4"])
@pytest.mark.parametrize(
    "key", ["model.layers.2.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"]
)
def test_nan_in_a_weight(broken: Path, tmp_path: Path, recipe: str, key: str) -> None:
    weights = load_file(broken / "model.safetensors")
    weights[key].view(-1)[3] = torch.nan
    save_file(weights, broken / "model.safetensors")
    message = refused(2, "quantize", recipe, "--model", broken, "--out", tmp_path / "out")
    assert key in message and "NaN" in message
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_group_size_that_does_not_divide(tmp_path: Path) -> None:
    message = refused(
        2,
        *("quantize", "rtn-w4-g128", "--model", "demo", "--out", tmp_path / "out"),
        *("--set", "quantize.group_size=96"),
    )
    assert "group size 96 doesn't divide 256" in message and "group_size" in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_calibration_file(tmp_path: Path, content: str) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content)
    message = refused(
        2,
        *("quantize", "gptq-w4-g128", "--model", "demo", "--out", tmp_path / "out"),
        *("--set", f"calibration.dataset={empty}"),
    )
    assert "empty.jsonl is empty" in message


def test_calibration_text_that_is_missing_malformed_or_too_short(tmp_path: Path) -> None:
    base = ("quantize", "gptq-w4-g128", "--model", "demo", "--out", tmp_path / "out", "--set")
    message = refused(2, *base, f"calibration.dataset={tmp_path}/nowhere.txt")
    assert "nowhere.txt: no such file" in message
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"txt": 1}\n')
    assert "bad.jsonl:2: has none of the keys" in refused(2, *base, f"calibration.dataset={bad}")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert "less than one row of 512" in refused(2, *base, f"calibration.dataset={short}")


def test_an_output_that_exists(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    message = refused(2, "quantize", "nf4", "--model", "demo", "--out", out)
    assert "exists already" in message and "--force" in message
    message = refused(2, "quantize", "nf4", "--model", "demo", "--out", out, "--force")
    assert "isn't an artifact of ours" in message
    assert (out / "thesis.txt").read_text() == "precious"


def test_patterns_that_match_nothing_and_fused_siblings(tmp_path: Path) -> None:
    base = ("quantize", "gptq-w4-g128", "--model", "demo", "--dry-run", "--set")
    message = refused(2, *base, "quantize.ignore=[lm_haed]")
    assert "pattern 'lm_haed' matches no linear module" in message
    message = refused(2, *base, "quantize.overrides=[{match: '*.q_proj', bits: 8}]")
    assert "need the same scheme" in message and "model.layers.0.self_attn" in message


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    message = refused(
        2, "quantize", "rtn-w4-g128", "-m", "demo", "--dry-run", "--set", "quantize.bits=3"
    )
    assert "the awq format holds 4 bits only, not 3" in message and "format: gptq" in message


def test_another_architecture_for_gguf(tiny: Tiny, tmp_path: Path) -> None:
    message = refused(2, "quantize", "gguf-q8-0", "-m", tiny("opt"), "-o", tmp_path / "out")
    assert "opt" in message and "llama" in message


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "qwen3"])
def test_gguf_of_a_checkpoint_without_a_tokenizer(
    tiny: Tiny, tmp_path: Path, model_type: str
) -> None:
    """transformers makes an empty tokenizer of such a directory."""
    message = refused(2, "quantize", "gguf-q8-0", "-m", tiny(model_type), "-o", tmp_path / "out")
    assert "has no tokenizer" in message and "save_pretrained" in message


def test_a_quantized_model_is_not_quantized_again(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (broken / "config.json").write_text(json.dumps(config))
    message = refused(2, "quantize", "nf4", "--model", broken, "--out", tmp_path / "out")
    assert "is quantized already (awq)" in message


def test_devices_that_are_not_there(tmp_path: Path) -> None:
    base = ("quantize", "rtn-w4-g128", "--model", "demo", "--out", tmp_path / "out", "--device")
    assert "none of auto, cpu, cuda" in refused(2, *base, "gpu")
    if not torch.cuda.is_available():
        assert "torch sees 0 CUDA devices" in refused(3, *base, "cuda:0")


def test_errors_are_json_too(tmp_path: Path) -> None:
    result = run("quantize", "nf4", "--model", "./nowhere", "--out", tmp_path / "o", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["where"] == "./nowhere"


def test_a_full_disk(tmp_path: Path) -> None:
    """For real: no file may grow past 200 kB."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    for recipe in ("rtn-w4-g128", "gguf-q8-0"):
        done = subprocess.run(
            [QUANTKIT, "quantize", recipe, "--model", "demo", "--out", str(tmp_path / "out")],
            capture_output=True,
            text=True,
            preexec_fn=limit,
        )
        assert done.returncode == 3, done.stderr
        assert "no space left to write" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists()
        # What was finished is kept, and the same command goes on from there.
        if (tmp_path / "out.partial").exists():
            assert "the same command continues" in done.stderr
            assert (
                run("quantize", recipe, "--model", "demo", "--out", tmp_path / "out").exit_code == 0
            )
            shutil.rmtree(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_full_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    monkeypatch.setattr(quantkit, "bench", full)
    message = refused(3, "bench", "demo")
    assert "the GPU's memory is full: CUDA out of memory" in message and "--device cpu" in message


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_half_way(tmp_path: Path, sent: signal.Signals) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen(
        [QUANTKIT, "quantize", "gptq-w4-g128", "--model", "demo", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "QUANTKIT_CACHE": str(tmp_path / "cache")},
        # Shells start what they put into the background with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    journal = partial / "unfinished" / "journal.jsonl"
    while (
        not (journal.exists() and journal.read_bytes().count(b"\n") > 1)
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert partial.exists() and process.poll() is None
    process.send_signal(sent)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "interrupted" in said and "Traceback" not in said
    assert f"are kept in {partial}" in said
    assert [path for path in tmp_path.iterdir() if path.name != "cache"] == [partial]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("metric: kl.mean, max: 1", "no such metric: kl.mean; metrics: perplexity.value,"),
        ("metric: regression.tags.x.speed, max: 1", "no such metric: regression.tags.x.speed"),
        ("metric: regression.tags.pass_rate, max: 1", "no such metric: regression.tags.pass_rate"),
        ("metric: kl_divergence.mean", "a gate needs min, max or both"),
        ("metric: perplexity.ratio, min: 2, max: 1", "perplexity.ratio: min 2.0 is above max 1.0"),
        (
            "metric: kl_divergence.p99, max: 1, confidence: 0.95",
            "kl_divergence.p99 has no interval",
        ),
        ("metric: regression.tags.x.broken, max: 1, confidence: 0.9", "x.broken has no interval"),
        ("metric: kl_divergence.mean, max: 1, confidence: 95", "confidence: input should be less"),
        ("metric: kl_divergence.mean, max: 1, confidance: 0.9", "did you mean confidence?"),
    ],
)
def test_gates_that_cannot_be_held_are_refused_before_work(
    tmp_path: Path, gate: str, message: str
) -> None:
    suite = tmp_path / "s.yaml"
    suite.write_text(
        f"schema: 1\nname: s\nversion: 1.0.0\nlikelihood: {{dataset: x.txt}}\ngates: [{{{gate}}}]\n"
    )
    said = refused(2, "eval", tmp_path, "--baseline", "demo", "--suite", suite)
    assert "s.yaml: gates.0" in said and message in said and "docs/suites.md" in said


def test_a_memory_budget_that_is_no_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = refused(
        2, "quantize", "nf4", "--model", "demo", "--out", out, "--memory-budget", "much"
    )
    assert "--memory-budget" in message and "isn't a size" in message
    assert not out.exists()


def test_gptq_in_gguf_needs_calibration_and_a_known_mix(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    head = "schema: 1\nname: r\nversion: 1.0.0\n"
    recipe.write_text(head + "quantize: {method: gptq, format: gguf, mix: q4_k_m}\n")
    assert "needs a calibration" in refused(2, "recipes", "show", recipe)
    recipe.write_text(head + "quantize: {method: gptq, format: gguf, mix: q9_k}\n")
    assert "quantize.mix" in refused(2, "recipes", "show", recipe)
    recipe.write_text(head + "quantize: {method: gptq, format: gguf, bits: 4, mix: q4_k_m}\n")
    assert "quantize.bits: unknown key" in refused(2, "recipes", "show", recipe)
