"""A comparison of three artifacts as it might be, with answers that nobody should trust."""

from __future__ import annotations

import math
from typing import Any

from quantkit.results.comparison import CaseInput, Comparison, Occasion, Variant
from quantkit.results.cost import Cost
from quantkit.results.harness import HarnessResult, SampleOutcome, TaskResult
from quantkit.results.localization import Localization, PlaceLoss
from quantkit.results.metrics import KL_MEAN
from quantkit.results.quality import Interval, KlDivergence, Perplexity, Quality, RowSums, Slice
from quantkit.results.regression import CaseOutcome, CheckOutcome, RegressionResult
from quantkit.results.verdict import GateOutcome, Verdict
from tests.helpers.manifests import RUN, sample_manifest
from tests.helpers.present import present

HOSTILE = (
    "<script>alert('x')</script><img src=//e.example/x onerror=alert(1)>"
    ' & \x00\x1b "quoted" <style>@import url(//e.example/y)</style>'
)

LOSSES = Localization(
    rows=8,
    kl_divergence=0.05,
    places=(PlaceLoss(("model.layers.0.mlp.down_proj",), 0.2, 0.03),),
    no_patch="every place has 8 bits already",
)


def cases(broken: int) -> RegressionResult:
    return RegressionResult(
        tuple(
            CaseOutcome(
                id=f"c{i}",
                passed=broken <= i < 19,
                baseline_passed=i < 19,
                critical=i == 0,
                tags=("facts",) if i % 2 else ("facts", "sums"),
                answer=HOSTILE if i < broken else "the answer is 4",
                baseline_answer="the answer is 4",
                checks=(
                    CheckOutcome(
                        check="number",
                        passed=broken <= i < 19,
                        baseline_passed=i < 19,
                        why=None if broken <= i < 19 else "holds no number",
                        baseline_why=None if i < 19 else "holds no number",
                    ),
                ),
            )
            for i in range(20)
        )
    )


def by_tag(result: RegressionResult) -> tuple[Slice, ...]:
    parts = [(None, result), *((tag, present(result.tagged(tag))) for tag in result.tags)]
    return tuple(
        Slice(
            tag=tag,
            total=part.total,
            passed=part.passed,
            baseline_passed=part.baseline_passed,
            broken=part.broken,
            fixed=part.fixed,
            pass_rate=Interval(part.pass_rate - 0.1, 1.0, 0.95, "exact", part.total, "cases"),
            difference=Interval(-0.1, 0.1, 0.95, "exact", part.total, "cases"),
            p_value=1.0,
        )
        for tag, part in parts
    )


def quality(kl: float, broken: int = 0) -> Quality:
    samples = (SampleOutcome(0, "ab", "acc", 1.0 - bool(broken), 1.0, '"4"', '"4"'),)
    rows = tuple(kl * 255 * math.exp(math.sin(i)) for i in range(64))
    return Quality(
        row_sums=RowSums((255,) * 64, rows, rows, rows, (250,) * 64),
        slices=by_tag(cases(broken)),
        perplexity=Perplexity(10.0, 0.1, 1 + kl),
        kl_divergence=KlDivergence(mean=kl, p99=kl * 5),
        intervals={KL_MEAN: Interval(kl * 0.9, kl * 1.1, 0.95, "bootstrap-t", 64, "rows")},
        top1_agreement=1 - kl,
        regression=cases(broken),
        dtype="float32",
        rows=64,
        sequence_length=256,
        harness=HarnessResult(
            (TaskResult("sums", "1", {"acc,none": 0.5}, {"acc,none": 0.5}, samples),)
        ),
    )


def cost(engine: str, megabytes: float, rate: float) -> Cost:
    return Cost(
        engine=engine,
        device="cpu",
        threads=2,
        prompt_tokens=128,
        new_tokens=32,
        repeats=3,
        weights_bytes=int(megabytes * 1e6),
        resident_bytes=int(megabytes * 1e6) + 10**8,
        peak_bytes=int(megabytes * 1e6) + 2 * 10**8,
        prefill_tokens_per_second=10 * rate,
        decode_tokens_per_second=rate,
        decode_tokens_per_second_batch8=None,
        ttft_ms=1e4 / rate,
        tpot_ms=1e3 / rate,
        missing={"decode_tokens_per_second_batch8": "one at a time only"},
    )


def artifact(method: str, kl: float, megabytes: float, broken: int, verdict: Verdict) -> Variant:
    return Variant(
        name=f"{method}-w4",
        path=f"artifacts/{method}-w4",
        recipe=f"{method}-w4 1.0.0",
        method=method,
        format=method,
        bits_per_weight=4.25,
        disk_bytes=int(megabytes * 1e6),
        quality=quality(kl, broken),
        cost=cost("quantkit-int4", megabytes, 600.0),
        gates=(
            GateOutcome("kl_divergence.mean", kl, None, 0.02, verdict),
            GateOutcome("regression.pass_rate", cases(broken).pass_rate, 0.5, None, Verdict.PASS),
        ),
        verdict=verdict,
        manifest=sample_manifest(method, kl),
        localization=None if verdict is Verdict.PASS else LOSSES,
        run=RUN,
    )


def sample(goal: str | None = "Answers in 8 GB of memory") -> Comparison:
    """A baseline, its noise floor, and artifacts of which one fails and breaks two cases."""
    plain: dict[str, Any] = {
        "path": "model",
        "recipe": None,
        "method": None,
        "format": "safetensors",
        "bits_per_weight": 16.0,
        "disk_bytes": 5_300_000,
    }
    own = Quality(
        perplexity=Perplexity(9.9, 0.1),
        kl_divergence=None,
        top1_agreement=None,
        regression=cases(0),
        dtype="float32",
        rows=64,
        sequence_length=256,
    )
    base = Variant("BF16", **plain, quality=own, cost=cost("transformers", 5.3, 370.0))
    floor = Variant("BF16 vs FP32", **plain, quality=quality(4e-5))
    return Comparison(
        suite="s 1.0.0",
        baseline=base,
        references=(floor,),
        variants=(
            artifact("awq", 0.0015, 1.8, 0, Verdict.PASS),
            artifact("gptq", 0.0006, 1.9, 0, Verdict.PASS),
            artifact("rtn", 0.05, 1.8, 2, Verdict.FAIL),
        ),
        differences=("awq-w4: the weights only (awq).",),
        way_back="serve the baseline again: model",
        verdict=Verdict.FAIL,
        goal=goal,
        cases=tuple(CaseInput(f"c{i}", "user: What is 2 + 2?", "number: 4.0") for i in range(20)),
        occasion=Occasion(
            "demo", "23" * 32, "2026-11-20T10:00:00Z", "0.1.0", {"torch": "2.13.0"}, {"cores": 2}
        ),
    )
