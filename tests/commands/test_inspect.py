"""What is known of an artifact without running it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantkit.base.resources import demo_model
from quantkit.cli import app
from quantkit.commands.inspect import inspect
from tests.helpers.foreign_tiny import Packed, awq, code, gptq, write
from tests.helpers.present import present
from tests.helpers.tiny import Tiny

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def run(*arguments: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON on stdout and stderr of a command."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout), result.stderr


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


def test_awq_needs_widths_that_vllm_takes(tiny: Tiny, tmp_path: Path) -> None:
    def pack(name: str, weight: torch.Tensor) -> Packed | None:
        coded = code(weight, 4, 32)
        return awq(coded), coded.weight

    write(tiny("llama", torch.bfloat16, intermediate_size=160), tmp_path / "a", AWQ, pack)
    [vllm] = [e for e in inspect(tmp_path / "a").engines if e.engine == "vLLM"]
    assert vllm.loads == "yes"
