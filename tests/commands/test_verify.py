"""inspect says what lies there; verify finds what is wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quantkit.artifact.findings import Check, Verification
from quantkit.base.errors import InputError, MachineError
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.commands.inspect import inspect
from quantkit.commands.quantize import prepare, quantize
from quantkit.commands.verify import _speaks, _Subject
from quantkit.engines.trial import Trial, run_trial
from quantkit.formats.gguf.file import plan_file
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.gguf.writer import write_file
from quantkit.formats.packed import open_artifact
from quantkit.recipes.recipe import load_recipe
from quantkit.reports.findings import checks_table
from tests.helpers.foreign_tiny import Packed, awq, code, gptq, write
from tests.helpers.present import present
from tests.helpers.tiny import Tiny

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo by round-to-nearest."""
    out = tmp_path_factory.mktemp("made") / "rtn"
    quantize(
        prepare(load_recipe("rtn-w4-g128"), "demo"),
        out,
        device="cpu",
        force=False,
        progress=Silent(),
    )
    return out


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "demo-q8_0.gguf"
    baseline = Checkpoint(demo_model())
    write_file(path, plan_file(baseline, "q8_0"), baseline)
    return path


def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout and stderr of a command."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


def outcomes(value: dict[str, Any]) -> dict[str, bool | None]:
    return {check["name"]: check["passed"] for check in value["checks"]}


def test_a_whole_artifact_is_verified(artifact: Path) -> None:
    code, value, _ = run("verify", artifact, "--baseline", "demo")
    assert code == 0 and value["passed"] and value["engine"] == "quantkit-int4"
    found = outcomes(value)
    assert set(found.values()) == {True}
    assert found.keys() == {
        *("digests", "files missing", "files extra", "shapes", "finite"),
        *("chat template", "chats", "tokens", "loads", "logits", "speaks"),
    }


def test_every_damage_has_its_line(artifact: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(artifact, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.scales"][0, 5] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    template = (broken / "chat_template.jinja").read_text()
    (broken / "chat_template.jinja").write_text(f"Answer!{template}")
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (broken / "tokenizer.json").write_text(json.dumps(tokenizer))
    (broken / "generation_config.json").unlink()
    (broken / "notes.txt").write_text("new")
    code, value, _ = run("verify", broken, "--baseline", "demo")
    details = {check["name"]: check["detail"] for check in value["checks"]}
    assert code == 1 and not value["passed"]
    failed = {name for name, passed in outcomes(value).items() if not passed}
    assert failed == {
        *("digests", "files missing", "files extra", "finite"),
        *("chat template", "chats", "tokens", "logits", "speaks"),
    }
    assert details["files missing"] == "the manifest names generation_config.json"
    assert details["files extra"] == "not in the manifest notes.txt"
    assert details["finite"] == "NaN or infinity in model.layers.2.mlp.up_proj.weight"
    checks = tuple(Check(**check) for check in value["checks"])
    page = StringIO()
    shown = Console(width=200, file=page)
    shown.print(checks_table(Verification(str(broken), "demo", value["engine"], checks)))
    text = page.getvalue()
    assert text.count("✗") == len(failed) and text.count("✓") == 2 and "FAILED" in text


@pytest.mark.engine
def test_a_gguf_is_tokenized_by_llamacpp(gguf: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    code, value, _ = run("verify", gguf, "--baseline", "demo")
    assert code == 0 and value["engine"] == "llama.cpp"
    found = outcomes(value)
    assert found.pop("digests") is None  # no manifest beside it
    assert set(found.values()) == {True} and {"tokens", "special tokens"} <= found.keys()
    # Of a baseline with another tokenizer, all that differs is said.
    other = shutil.copytree(demo_model(), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    code, value, _ = run("verify", gguf, "--baseline", other)
    found = outcomes(value)
    assert code == 1
    assert [found[name] for name in ("chat template", "chats", "tokens")] == [False] * 3
    assert found["shapes"] and found["speaks"]


def subject(path: Path, baseline: Path | None) -> _Subject:
    source = None if baseline is None else Checkpoint(baseline)
    return _Subject(path, path, open_artifact(path), source)


def test_shapes_are_held_against_what_is_there(tiny: Tiny, artifact: Path, gguf: Path) -> None:
    assert subject(artifact, None).shapes().passed is True  # its own config.json
    assert subject(gguf, None).shapes().passed is None
    assert subject(gguf, demo_model()).shapes().passed is True
    other = subject(artifact, tiny("llama", torch.bfloat16)).shapes()
    assert other.passed is False and "config.json asks for" in other.detail


def test_without_a_baseline_tokens_are_left_open(artifact: Path) -> None:
    [check] = subject(artifact, None).tokenizer()
    assert check.passed is None


@pytest.mark.parametrize(
    ("engine", "code", "message"),
    [
        ("vllm", 3, "needs vllm, which isn't installed"),
        ("transformers", 3, "needs gptqmodel for this format"),
        ("llama.cpp", 2, "llama.cpp doesn't run safetensors"),
        ("exllama", 2, "no such engine"),
    ],
)
def test_engines_that_cannot_be_asked(artifact: Path, engine: str, code: int, message: str) -> None:
    if code == 3 and find_spec("gptqmodel" if engine == "transformers" else engine):
        pytest.skip("is installed here")
    got, value, _ = run("verify", artifact, "--engine", engine)
    assert got == code
    assert message in value["error"]["what"] and value["error"]["fix"]


def test_what_is_no_artifact_is_said_so(tmp_path: Path) -> None:
    for command in ("inspect", "verify"):
        code, value, _ = run(command, tmp_path / "nothing")
        assert code == 2 and value["error"]["what"] == "no such file or directory"
        code, value, _ = run(command, tmp_path)
        assert code == 2 and "config.json" in value["error"]["where"]


def test_engines_that_cannot_load_or_die_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="ended with code 1: KeyError"):
        run_trial(Trial(str(tmp_path), "no such engine", ([1],), 2))
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: killed)
    with pytest.raises(MachineError, match="perhaps for want of memory"):
        run_trial(Trial(str(tmp_path), "transformers", ([1],), 2))


def test_loops_and_silence_are_no_answers() -> None:
    assert not _speaks([[], [7] * 20], None).passed
    assert _speaks([[7] * 20, [7, 8] * 10], None).passed
    assert _speaks([[3]], None).passed


def test_facts_of_our_own(artifact: Path) -> None:
    facts = inspect(artifact)
    manifest = json.loads((artifact / "quantkit.json").read_text())
    assert facts.format == "awq (gemm)" and facts.method == "rtn"
    assert facts.producer == f"quantkit {manifest['quantkit']}"
    assert facts.plan.quantized_bits_per_weight == manifest["bits_per_weight"]["quantized"]
    assert facts.bits_per_weight == manifest["bits_per_weight"]["file"]
    assert present(facts.provenance)["recipe"]["digest"] == manifest["recipe"]["digest"]
    rows = {row.name: row.scheme for row in facts.plan.rows()}
    assert rows["model.layers.*.mlp.up_proj.weight"] == "int4 g128 asym"
    assert facts.tokenizer["eos_token"] == "<|end|>"
    result = CliRunner().invoke(app, ["inspect", str(artifact)])
    for text in ("int4 g128 asym", "awq (gemm)", "provenance", "quantkit-int4"):
        assert text in result.stdout


def test_facts_of_others(tiny: Tiny, gguf: Path, tmp_path: Path) -> None:
    source = tiny("llama", torch.bfloat16)

    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32, symmetric=True, permuted=True)
        return gptq(coded, 4), coded.weight

    settings = {**GPTQ, "desc_act": True, "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    write(source, tmp_path / "gptq", settings, pack)
    facts = inspect(tmp_path / "gptq")
    assert facts.producer == "gptqmodel 7.7.0" and facts.provenance is None
    loads = {engine.engine: engine for engine in facts.engines}
    assert loads["vLLM"].loads == "no" and "permuted groups" in loads["vLLM"].why
    assert loads["quantkit-int4"].loads == "yes"
    plain = inspect(demo_model())
    assert plain.format == "safetensors" and plain.plan.quantized_bits_per_weight is None
    named = inspect(gguf)
    assert named.metadata["llama.block_count"] == 4
    assert named.metadata["tokenizer.ggml.tokens"] == "1024 values"
    assert named.tokenizer["chat_template"] == plain.tokenizer["chat_template"]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "why"),
    [
        (4, 32, True, ""),
        (4, 32, False, "asymmetric GPTQ"),
        (3, 32, True, "3 bits"),
        (8, 32, True, "on CPU: 8 bits"),
        (4, 16, True, "groups of another size"),
    ],
)
def test_what_vllm_loads(
    tiny: Tiny, tmp_path: Path, bits: int, group: int, symmetric: bool, why: str
) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, bits, group, symmetric=symmetric, lowest=1)
        return gptq(coded, bits), coded.weight

    settings = {**GPTQ, "bits": bits, "group_size": group, "sym": symmetric}
    write(tiny("llama", torch.bfloat16), tmp_path, settings, pack)
    [vllm] = [engine for engine in inspect(tmp_path).engines if engine.engine == "vLLM"]
    assert (vllm.loads == "no") == bool(why) and why in vllm.why


def test_a_gguf_in_parts_is_one_model(gguf: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    reader = library.GGUFReader(gguf)
    writer = library.GGUFWriter(tmp_path / "demo.gguf", "llama", split_max_tensors=15)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            sub = kinds[-1] if kinds[0] == library.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.glob("*.gguf"))) == 3
    parts, whole = GgufWeights(tmp_path), GgufWeights(gguf)
    assert set(parts.keys()) == set(whole.keys())
    for key in whole.keys():  # noqa: SIM118 (it's no dictionary)
        assert torch.equal(parts.read(key), whole.read(key)), key
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(InputError, match="in 3 parts"):
        GgufWeights(tmp_path)


def test_awq_needs_widths_that_vllm_takes(tiny: Tiny, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32)
        return awq(coded), coded.weight

    write(tiny("llama", torch.bfloat16, intermediate_size=160), tmp_path / "a", AWQ, pack)
    [vllm] = [e for e in inspect(tmp_path / "a").engines if e.engine == "vLLM"]
    assert vllm.loads == "yes"
