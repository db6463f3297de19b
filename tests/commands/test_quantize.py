"""From recipe to artifact on the demo model: what is written loads, runs, and is judged fairly."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from quantkit.base.files import read_json, sha256
from quantkit.base.progress import Silent
from quantkit.base.resources import demo_model
from quantkit.checkpoint.reader import Checkpoint
from quantkit.cli import app
from quantkit.cli.comparison import finish
from quantkit.cli.console import Console
from quantkit.commands.bench import measure_costs
from quantkit.commands.quantize import prepare, quantize
from quantkit.engines import int4
from quantkit.engines import transformers as hf
from quantkit.formats.gguf.reader import GgufWeights
from quantkit.formats.packed import PackedCheckpoint, open_artifact
from quantkit.judging.answers import Answer
from quantkit.judging.cases import encode_prompt, load_cases
from quantkit.judging.quality import judge_quality
from quantkit.judging.regression import judge_answers
from quantkit.judging.significance import mcnemar, mean_interval
from quantkit.judging.variants import build_comparison
from quantkit.methods.grids import QuantizedTensor
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.recipes.recipe import load_recipe
from quantkit.recipes.suite import Gate, load_suite
from quantkit.results.comparison import Comparison
from quantkit.results.cost import Load
from quantkit.results.manifest import QuantizedManifest
from quantkit.results.quality import Qualities, Quality
from quantkit.results.verdict import Verdict
from tests.helpers.present import present

SHIPPED = [
    *("awq-w4-g128", "gptq-w4-g128", "nf4", "gguf-q4-k-m", "gguf-q8-0", "rtn-w4-g128"),
    *("gguf-q4-k-m-gptq", "ct-w4a16-g128", "ct-awq-w4a16-g128", "int8-w8a8", "fp8"),
]
IN_SAFETENSORS = [
    *("awq-w4-g128", "gptq-w4-g128", "rtn-w4-g128"),
    *("ct-w4a16-g128", "ct-awq-w4a16-g128", "int8-w8a8", "fp8"),
]
TWO_BITS = ["quantize.bits=2", "quantize.format=gptq"]
CPU = torch.device("cpu")


def make(recipe: str, out: Path, settings: list[str] | None = None) -> QuantizedManifest:
    job = prepare(load_recipe(recipe, settings), "demo")
    # Without the cache, or the second of two runs would not calibrate.
    return quantize(job, out, device="cpu", force=False, progress=Silent(), cache=False)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo by every shipped recipe, and by 2-bit round-to-nearest."""
    folder = tmp_path_factory.mktemp("artifacts")
    for recipe in SHIPPED:
        make(recipe, folder / recipe)
    make("rtn-w4-g128", folder / "rtn-w2", TWO_BITS)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def qualities(artifacts: dict[str, Path]) -> tuple[dict[str, Path], Qualities]:
    """The demo suite's word on some artifacts, and on the baseline given as an artifact."""
    names = ["rtn-w4-g128", "gguf-q8-0", "rtn-w2", "ct-w4a16-g128", "ct-awq-w4a16-g128"]
    names += ["int8-w8a8", "fp8"]
    paths = {name: artifacts[name] for name in names} | {"bf16": demo_model()}
    baseline, suite = Checkpoint(demo_model()), load_suite("demo")
    found = judge_quality(list(paths.values()), baseline, suite, device="cpu", progress=Silent())
    return paths, found


@pytest.fixture(scope="session")
def judged(
    qualities: tuple[dict[str, Path], Qualities],
) -> tuple[Quality, dict[str, Quality]]:
    """Qualities of the baseline and of some artifacts under the demo suite."""
    paths, found = qualities
    return found.baseline, dict(zip(paths, found.artifacts, strict=True))


def verdict_on(
    qualities: tuple[dict[str, Path], Qualities], *names: str, gates: list[Gate] | None = None
) -> tuple[Comparison, int]:
    """The comparison of some of the artifacts, and the exit code that it ends in."""
    paths, found = qualities
    suite = load_suite("demo")
    if gates is not None:
        suite.suite = suite.suite.model_copy(update={"gates": gates})
    of = dict(zip(paths, found.artifacts, strict=True))
    some = replace(found, artifacts=tuple(of[name] for name in names))
    result = build_comparison(
        Checkpoint(demo_model()), [paths[name] for name in names], suite, some, None
    )
    try:
        finish(Console(), result)
    except typer.Exit as left:
        return result, left.exit_code
    return result, 0


@pytest.mark.parametrize("name", [*SHIPPED, "rtn-w2"])
def test_the_manifest_tells_the_truth(artifacts: dict[str, Path], name: str) -> None:
    directory = artifacts[name]
    manifest = json.loads((directory / "quantkit.json").read_text())
    on_disk = {path.name for path in directory.iterdir()} - {"quantkit.json", "run.json"}
    assert manifest["files"].keys() == on_disk
    for file, facts in manifest["files"].items():
        assert facts["sha256"] == sha256(directory / file)
    derived = name == "rtn-w2"
    loaded = load_recipe("rtn-w4-g128", TWO_BITS) if derived else load_recipe(name)
    assert manifest["recipe"]["digest"] == loaded.recipe.digest
    assert manifest["source"]["files"]["model.safetensors"] == sha256(
        demo_model() / "model.safetensors"
    )
    dataset = loaded.calibration_dataset()
    if dataset is not None:
        assert isinstance(dataset, Path)
        assert manifest["calibration"]["dataset_sha256"] == sha256(dataset)
    assert manifest["bits_per_weight"]["quantized"] < manifest["bits_per_weight"]["file"]
    assert all(layer["error"] >= 0 for layer in manifest["layers"])
    assert manifest["summary"]["layers"] == len(manifest["layers"])


@pytest.mark.parametrize("name", SHIPPED)
def test_sidecars_are_copied_byte_for_byte(artifacts: dict[str, Path], name: str) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (artifacts[name] / file).read_bytes() == (demo_model() / file).read_bytes()
    template = "chat_template.jinja"
    assert (artifacts[name] / template).read_bytes() == (demo_model() / template).read_bytes()


@pytest.mark.parametrize("name", IN_SAFETENSORS)
def test_sizes_are_as_planned(artifacts: dict[str, Path], name: str) -> None:
    plan = prepare(load_recipe(name), "demo").plan
    checkpoint = Checkpoint(artifacts[name])
    assert checkpoint.nbytes() == plan.nbytes


def test_the_methods_report_what_they_did(artifacts: dict[str, Path]) -> None:
    awq, gptq = (
        json.loads((artifacts[name] / "quantkit.json").read_text())
        for name in ("awq-w4-g128", "gptq-w4-g128")
    )
    assert gptq["summary"]["not_factorized"] == []
    assert awq["summary"]["scaled"] + len(awq["summary"]["not_scaled"]) == 28
    for layer in range(4):
        scaled = [x for x in awq["layers"] if f"layers.{layer}." in x["name"] and x["scaled"]]
        assert len(scaled) >= 5


@pytest.mark.parametrize("mix", ["q2_k", "q3_k_m", "q5_k_m", "q6_k"])
def test_error_feedback_in_k_quants(tmp_path: Path, mix: str) -> None:
    """Types and size are llama.cpp's, the outputs nearer, the bytes those of any thread count."""
    few = ["calibration.samples=16"]
    name = f"gguf-{mix.replace('_', '-')}-gptq"
    make(name, tmp_path / "feedback", few)
    make("gguf-q4-k-m", tmp_path / "plain", [*few, f"quantize.mix={mix}"])
    ours, theirs = (open_artifact(tmp_path / folder) for folder in ("feedback", "plain"))
    assert isinstance(ours, GgufWeights) and isinstance(theirs, GgufWeights)
    assert ours.types == theirs.types
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        make(name, tmp_path / "again", few)
    finally:
        torch.set_num_threads(threads)
    layers = read_json(tmp_path / "feedback" / "quantkit.json")["layers"]
    measured = {layer["name"]: layer["measured_on"] for layer in layers}
    # The demo's embeddings are tied: the matrix that makes the logits gets feedback too.
    assert {measured["token_embd.weight"], measured["blk.0.attn_q.weight"]} == {"outputs"}
    (file,) = (tmp_path / "feedback").glob("*.gguf")
    (plain,) = (tmp_path / "plain").glob("*.gguf")
    assert sha256(tmp_path / "again" / file.name) == sha256(file)
    assert file.stat().st_size == plain.stat().st_size
    suite = load_suite("demo")
    suite.suite = suite.suite.model_copy(update={"regression": None})
    found = judge_quality(
        [tmp_path / "feedback", tmp_path / "plain"],
        Checkpoint(demo_model()),
        suite,
        device="cpu",
        progress=Silent(),
    )
    kl = [present(quality.kl_divergence).mean for quality in found.artifacts]
    assert kl[0] < 0.8 * kl[1]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_same_inputs_give_the_same_bytes_for_any_number_of_threads(
    artifacts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        make(name, tmp_path / name)
    finally:
        torch.set_num_threads(threads)
    files = {path.name for path in artifacts[name].iterdir()} - {"run.json"}
    assert files == {path.name for path in (tmp_path / name).iterdir()} - {"run.json"}
    for file in files:
        assert sha256(tmp_path / name / file) == sha256(artifacts[name] / file), file


def test_the_baseline_knows_its_world(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    baseline, _ = judged
    assert present(baseline.regression).total >= 60
    assert present(baseline.regression).pass_rate >= 0.95


def test_four_bits_pass_and_two_bits_visibly_fail(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    baseline, artifacts = judged
    answers = {name: present(artifacts[name].regression) for name in artifacts}
    kl = {name: present(artifacts[name].kl_divergence).mean for name in artifacts}
    assert answers["rtn-w2"].broken >= 3
    assert answers["rtn-w2"].pass_rate < present(baseline.regression).pass_rate
    assert kl["rtn-w2"] > 15 * kl["rtn-w4-g128"]
    assert kl["gguf-q8-0"] < kl["rtn-w4-g128"]
    for name in ("rtn-w4-g128", "gguf-q8-0"):
        assert answers[name].broken_critical == 0


def test_the_baseline_against_itself_passes_every_gate(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    comparison, code = verdict_on(qualities, "bf16")
    (row,) = comparison.variants
    assert code == 0 and comparison.verdict is Verdict.PASS
    assert all(gate.passed for gate in row.gates) and len(row.gates) >= 6
    quality = present(row.quality)
    kl = present(quality.kl_divergence)
    assert kl.mean == quality.metric("kl_divergence.high") == 0
    assert quality.perplexity.ratio == 1 and present(quality.regression).broken == 0
    assert quality.slices[0].p_value == 1


def test_the_shipped_suite_passes_what_is_good_and_fails_two_bits(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "gguf-q8-0")
    assert code == 0 and comparison.verdict is Verdict.PASS
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "rtn-w2")
    assert code == 1 and comparison.verdict is Verdict.FAIL
    assert [row.verdict for row in comparison.variants] == [Verdict.PASS, Verdict.FAIL]
    kl = comparison.variants[1].gates[0]
    assert kl.verdict is Verdict.FAIL and present(kl.interval).low > present(kl.max)


def test_near_the_bound_is_exit_code_4(
    qualities: tuple[dict[str, Path], Qualities],
    judged: tuple[Quality, dict[str, Quality]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    near = 1.02 * present(judged[1]["rtn-w4-g128"].kl_divergence).mean
    gates = [Gate(metric="kl_divergence.mean", max=near, confidence=0.95)]
    comparison, code = verdict_on(qualities, "rtn-w4-g128", gates=gates)
    assert code == 4 and comparison.verdict is Verdict.INCONCLUSIVE
    assert present(comparison.variants[0].gates[0].more) > 77
    shown, said = capsys.readouterr()
    assert "INCONCLUSIVE" in shown and "to decide it: about" in said
    comparison, code = verdict_on(qualities, "rtn-w4-g128", "rtn-w2", gates=gates)
    assert code == 1 and comparison.verdict is Verdict.FAIL


def test_intervals_can_be_redone_from_the_json(
    qualities: tuple[dict[str, Path], Qualities],
) -> None:
    value = json.loads(json.dumps(verdict_on(qualities, "rtn-w2")[0].to_json(), allow_nan=False))
    quality = value["variants"][0]["quality"]
    sums, intervals = quality["row_sums"], quality["intervals"]
    assert len(sums["kl"]) == quality["rows"] and set(sums["tokens"]) == {255}
    low, high = mean_interval(sums["kl"], sums["tokens"])
    kl = intervals["kl_divergence.mean"]
    assert (kl["low"], kl["high"]) == pytest.approx((low, high), rel=1e-9)
    gap = np.subtract(sums["nll"], sums["baseline_nll"])
    assert quality["perplexity"]["ratio"] == pytest.approx(np.exp(gap.sum() / sum(sums["tokens"])))
    assert quality["top1_agreement"] == pytest.approx(sum(sums["agreed"]) / sum(sums["tokens"]))
    cases = quality["regression"]["cases"]
    lost = sum(case["baseline_passed"] and not case["passed"] for case in cases)
    won = sum(case["passed"] and not case["baseline_passed"] for case in cases)
    everything, *slices = quality["slices"]
    assert (everything["broken"], everything["fixed"]) == (lost, won) and lost >= 3
    assert everything["p_value"] == mcnemar(lost, won)
    assert sum(part["total"] for part in slices) == sum(len(case["tags"]) for case in cases)
    made = json.loads((Path(__file__).parents[1] / "data" / "demo_row_sums.json").read_text())
    assert sums["kl"] == pytest.approx(made["artifacts"]["rtn-w2"]["kl"], rel=0.01)


def test_gates_on_slices_that_no_case_has_are_refused(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    suites = load_suite("demo").path.parent
    for gate, message in (
        ("{metric: regression.tags.smus.pass_rate, min: 1}", "no case has the tag smus"),
        ("{metric: regression.worst_slice, min: 1}", "no tag has 500 cases"),
    ):
        suite = tmp_path / "s.yaml"
        suite.write_text(
            "schema: 1\nname: s\nversion: 1.0.0\n"
            f"likelihood: {{dataset: {suites / 'demo-heldout.jsonl'}, sequence_length: 64}}\n"
            f"regression: {{cases: {suites / 'demo-regression.jsonl'}, slice_cases: 500}}\n"
            f"gates: [{gate}]\n"
        )
        arguments = ["eval", str(artifacts["rtn-w2"]), "--baseline", "demo", "--suite", str(suite)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert f"gates.0: {message}" in " ".join(result.stderr.split())


def test_compressed_tensors_lose_little(
    judged: tuple[Quality, dict[str, Quality]],
) -> None:
    _, artifacts = judged
    nearest = artifacts["rtn-w4-g128"]
    for name in ("ct-w4a16-g128", "int8-w8a8", "fp8"):
        assert present(artifacts[name].kl_divergence).mean < present(nearest.kl_divergence).mean
        assert present(artifacts[name].regression).broken_critical == 0
    # On this model AWQ's scales gain nothing: its interval and that of rounding alone overlap.
    awq = present(artifacts["ct-awq-w4a16-g128"].kl_interval)
    assert awq.low < present(nearest.kl_interval).high
    assert present(artifacts["int8-w8a8"].kl_divergence).mean < 5e-4


def test_a_failed_gate_is_exit_code_1(artifacts: dict[str, Path]) -> None:
    arguments = [
        "eval",
        str(artifacts["rtn-w2"]),
        "--baseline",
        "demo",
        "--suite",
        "demo",
        "--json",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert value["verdict"] == "FAIL" and value["variants"][0]["verdict"] == "FAIL"


def test_nf4_loads_with_plain_transformers_and_answers(artifacts: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifacts["nf4"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifacts["nf4"])
    suite = load_suite("demo")
    cases = load_cases(suite.resolve(present(suite.suite.regression).cases))[:12]
    prompts = [encode_prompt(case, tokenizer) for case in cases]
    end = hf.end_tokens(artifacts["nf4"], tokenizer)
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
    end = hf.end_tokens(directory, tokenizer)
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


def test_costs_are_measured_in_fresh_processes(artifacts: dict[str, Path]) -> None:
    load = Load(prompt_tokens=16, new_tokens=4, repeats=1, threads=1)
    names = ["gptq-w4-g128", "gguf-q4-k-m"]
    costs = measure_costs(
        [artifacts[name] for name in names], Checkpoint(demo_model()), load, Silent()
    )
    assert [cost.engine for cost in costs.artifacts] == ["quantkit-int4", "llama.cpp"]
    baseline, gguf = present(costs.baseline), present(costs.baseline_gguf)
    assert (baseline.engine, gguf.engine) == ("transformers", "llama.cpp")
    weights = []
    for cost in (baseline, gguf, *costs.artifacts):
        assert cost.missing == {}
        weights.append(present(cost.weights_bytes))
        assert weights[-1] <= present(cost.resident_bytes) <= present(cost.peak_bytes)
        for figure in ("prefill_tokens_per_second", "decode_tokens_per_second", "ttft_ms"):
            assert getattr(cost, figure) > 0
    assert weights[2] < 0.5 * weights[0] and weights[3] < 0.5 * weights[1]


def test_an_engine_that_is_missing_leaves_its_figures_empty(
    artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "xllamacpp.py"
    blocked.write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    load = Load(prompt_tokens=4, new_tokens=2, repeats=1, threads=1)
    costs = measure_costs([artifacts["gguf-q8-0"]], None, load, Silent())
    (cost,) = costs.artifacts
    assert cost.decode_tokens_per_second is None
    assert "xllamacpp" in cost.missing["all figures"]


def test_sharded_checkpoints_are_the_same_model(tmp_path: Path, artifacts: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    job = prepare(load_recipe("rtn-w4-g128"), str(tmp_path / "sharded"))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent())
    one, other = Checkpoint(tmp_path / "out"), Checkpoint(artifacts["rtn-w4-g128"])
    assert set(one.keys()) == set(other.keys())
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.entries)


def test_overrides_are_obeyed_and_read_back(tmp_path: Path) -> None:
    settings = [
        "quantize.format=gptq",
        "quantize.overrides=[{match: '*.down_proj', bits: 8, group_size: 64},"
        " {match: 'model.layers.0.mlp.*', skip: true}]",
    ]
    make("rtn-w4-g128", tmp_path / "out", settings)
    source = open_artifact(tmp_path / "out")
    assert isinstance(source, PackedCheckpoint)
    down = source.read_quantized("model.layers.1.mlp.down_proj.weight")
    assert isinstance(down, QuantizedTensor)
    assert (down.grid.bits, down.grid.group_size) == (8, 64)
    query = source.read_quantized("model.layers.1.self_attn.q_proj.weight")
    assert isinstance(query, QuantizedTensor) and query.grid.bits == 4
    kept = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(source.read(kept), Checkpoint(demo_model()).read(kept))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert r"-:^model\.layers\.0\.mlp\.up_proj$" in config["dynamic"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["awq-w4-g128", "gptq-w4-g128", "gguf-q4-k-m"])
def test_a_gpu_makes_nearly_the_same_artifact(
    artifacts: dict[str, Path], tmp_path: Path, name: str
) -> None:
    job = prepare(load_recipe(name), "demo")
    quantize(job, tmp_path / name, device="cuda", force=False, progress=Silent())
    mine, theirs = open_artifact(tmp_path / name), open_artifact(artifacts[name])
    original = Checkpoint(demo_model())
    for key in original.entries:
        weight = original.read(key).float()
        errors = [(side.read(key).float() - weight).norm() for side in (mine, theirs)]
        assert abs(errors[0] - errors[1]) <= 0.1 * errors[1] + 1e-6, key


def test_answers_do_not_depend_on_what_shares_the_batch() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    prompts = [[5, 6, 7], [9, 8, 7, 6], [5, 6, 7], [20, 21, 22]]
    run = partial(hf.generate, model, end=[])
    together = run(prompts, [6] * 4)
    alone = [run([prompt], [6])[0] for prompt in prompts]
    assert together == alone and together[0] == together[2]
