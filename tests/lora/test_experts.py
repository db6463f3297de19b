"""Adapters of mixtures of experts, whose experts are one tensor or many, beside PEFT's merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantkit.api import merge
from quantkit.base.errors import InputError
from quantkit.base.progress import Silent
from quantkit.commands.quantize import prepare, quantize
from quantkit.lora.open import open_checkpoint
from quantkit.model.skeleton import Skeleton
from quantkit.recipes.recipe import load_recipe
from tests.helpers.adapters import (
    configure,
    load,
    merged_by_peft,
    rewrite,
    train,
    units_apart,
)
from tests.helpers.tiny import Tiny

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"experts.gate_up_proj": 3},
    "alpha_pattern": {r".*0.mlp.experts.down_proj": 20},
}
# Experts apart and together in the checkpoint; gate and up side by side and in turn; parameters
# (out, in) and (in, out), of which PEFT knows gpt_oss's.
CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "apart": ("qwen3_moe", ["q_proj"], {"target_parameters": STACKS}),
    "patterns": ("qwen3_moe", [], {"target_parameters": STACKS, **PATTERNS}),
    "other-names": ("mixtral", [], {"target_parameters": STACKS, "use_rslora": True}),
    "one-of-two": ("mixtral", [], {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "interleaved": ("gpt_oss", ["o_proj"], {"target_parameters": STACKS}),
    "together": ("granitemoe", [], {"target_parameters": [*STACKS, "q_proj.weight"]}),
    "taken-for-inputs": ("llama4_text", [], {"target_parameters": STACKS}),
    "no-gate": ("nemotron_h", [], {"target_parameters": ["experts.up_proj", "experts.down_proj"]}),
    "router": ("qwen3_moe", [], {"target_parameters": ["mlp.gate.weight", "experts.down_proj"]}),
    "attention": ("gpt_oss", ["q_proj", "o_proj"], {}),
    # Of nemotron_h's up projections only the shared experts' is a module that PEFT finds.
    "like-experts": ("nemotron_h", ["up_proj"], {}),
}


def state_of(directory: Path) -> dict[str, Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state: dict[str, Tensor] = model.state_dict()
    return state


def assert_merged(base: Path, adapter: Path, out: Path, expected: dict[str, Tensor]) -> set[str]:
    """The names of the parameters that the merge changes, all of them as ``expected``."""
    manifest = merge(base, [adapter], out=out)
    assert manifest.proof is not None and manifest.proof.difference < 1e-5
    stored, before = (load_file(d / "model.safetensors") for d in (out, base))
    assert {key: value.shape for key, value in stored.items()} == {
        key: value.shape for key, value in before.items()
    }
    changed = {key for key, value in stored.items() if not torch.equal(value, before[key])}
    assert manifest.changed_tensors == len(changed)
    result, original = state_of(out), state_of(base)
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert (result[name] - value).abs().max() <= 1e-6 * value.abs().max(), name
    return {name for name in result if not torch.equal(result[name], original[name])}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.filterwarnings("ignore:The following")
def test_a_merge_is_pefts(name: str, tiny: Tiny, tmp_path: Path) -> None:
    model_type, modules, options = CASES[name]
    config = {"target_modules": modules, **options}
    base = tiny(model_type)
    adapter = train(base, tmp_path / "adapter", config)
    expected = merged_by_peft(load(base), adapter)
    changed = assert_merged(base, adapter, tmp_path / "out", expected)
    ends = [*options.get("target_parameters", ()), *(f"{module}.weight" for module in modules)]
    assert changed == {n for n in expected if n.endswith(tuple(f".{end}" for end in ends))}
    assert changed


def for_experts(base: Path, out: Path, leaves: tuple[str, ...], prefix: str) -> Path:
    """An adapter as PEFT saved it when each expert was a module of its own."""
    out.mkdir()
    generator = torch.Generator().manual_seed(2)
    checkpoint = Skeleton(open_checkpoint(str(base)))
    weights: dict[str, Tensor] = {}
    for layer in range(3):
        for number in range(4):
            for leaf in leaves:
                own = f"{checkpoint.prefix}.{layer}.mlp.experts.{number}.{leaf}.weight"
                shape = checkpoint.model.get_parameter(own).shape
                stem = f"base_model.model.model.layers.{layer}.{prefix}.{number}.{leaf}"
                for part, size in (("A", (2, shape[1])), ("B", (shape[0], 2))):
                    weights[f"{stem}.lora_{part}.weight"] = (
                        torch.randn(size, generator=generator) * 0.1
                    )
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(r=2, lora_alpha=6, target_modules=list(leaves)).save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("model_type", "leaves", "prefix"),
    [
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), "mlp.experts"),
        ("mixtral", ("w1", "w3", "w2"), "block_sparse_moe.experts"),
    ],
)
def test_factors_of_separate_experts_merge_as_by_peft(
    model_type: str, leaves: tuple[str, ...], prefix: str, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny(model_type)
    adapter = for_experts(base, tmp_path / "adapter", leaves, prefix)
    changed = assert_merged(base, adapter, tmp_path / "out", merged_by_peft(load(base), adapter))
    assert len(changed) == 6  # gate and up are one parameter of transformers


def test_factors_of_separate_experts_merge_into_one_tensor_of_all(
    tiny: Tiny, tmp_path: Path
) -> None:
    """PEFT has no such model; W + 3 · B · A of one expert is a third of the rows of its part."""
    base = tiny("gpt_oss", torch.bfloat16)
    leaves = ("gate_proj", "up_proj", "down_proj")
    adapter = for_experts(base, tmp_path / "adapter", leaves, "mlp.experts")
    merge(base, [adapter], out=tmp_path / "out")
    stored, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", base))
    factors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.mlp.experts"
    for number in range(4):
        for leaf in leaves:
            a, b = (factors[f"{stem}.{number}.{leaf}.lora_{part}.weight"] for part in "AB")
            stack = "down_proj" if leaf == "down_proj" else "gate_up_proj"
            key = f"model.layers.1.mlp.experts.{stack}"
            first = {"gate_proj": 0, "up_proj": 1}.get(leaf)
            columns = slice(None) if first is None else slice(first, None, 2)
            expected = before[key][number][:, columns].float() + 3 * (b @ a).t()
            made = stored[key][number][:, columns].contiguous()
            assert units_apart(made, expected.bfloat16()) <= 1
            assert units_apart(made, before[key][number][:, columns].contiguous()) > 100


def test_an_adapted_checkpoint_reads_one_expert_as_a_merge_has_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny("gpt_oss", torch.bfloat16)
    config = {"target_parameters": STACKS}
    adapters = [train(base, tmp_path / str(seed), config, seed=seed) for seed in (1, 2)]
    merge(base, [(adapters[0], 0.5), (adapters[1], 1.0)], out=tmp_path / "out")
    adapted = open_checkpoint(str(base), [(str(adapters[0]), 0.5), (str(adapters[1]), 1.0)])
    skeleton = Skeleton(adapted)
    source = skeleton.viewed(adapted)
    merged = open_checkpoint(str(tmp_path / "out"))
    for key in adapted.keys():  # noqa: SIM118 (it's no dictionary)
        assert torch.equal(adapted.read(key), merged.read(key))
    for key in skeleton.views:
        assert torch.equal(source.read(key), skeleton.viewed(merged).read(key))
    key = "model.layers.2.mlp.experts.down_proj"
    assert torch.equal(adapted.read_rows(key, 2, 4), merged.read(key)[2:4])


def test_quantizing_with_an_adapter_is_merging_and_then_quantizing(
    tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny("gpt_oss", torch.bfloat16)
    adapter = train(base, tmp_path / "adapter", {"target_parameters": STACKS})
    merge(base, [adapter], out=tmp_path / "merged")
    recipe = load_recipe("rtn-w4-g128", ["quantize.group_size=32", "quantize.format=gptq"])
    for out, model, adapters in (
        ("folded", base, [(str(adapter), 1.0)]),
        ("after", tmp_path / "merged", []),
    ):
        job = prepare(recipe, str(model), adapters)
        quantize(job, tmp_path / out, device="cpu", force=False, progress=Silent())
    folded, after = (load_file(tmp_path / out / "model.safetensors") for out in ("folded", "after"))
    assert folded.keys() == after.keys() and any("experts.3.up_proj" in key for key in after)
    assert all(torch.equal(folded[key], after[key]) for key in after)


def biases(base: Path, out: Path) -> Path:
    return train(base, out, {"target_parameters": ["experts.gate_up_proj_bias"]})


def rankless(base: Path, out: Path) -> Path:
    train(base, out, {"target_parameters": STACKS})
    configure(out, r=5)
    return out


def undeclared(base: Path, out: Path) -> Path:
    train(base, out, {"target_parameters": STACKS})
    configure(out, target_parameters=["experts.down_proj"])
    return out


def misspelt(base: Path, out: Path) -> Path:
    train(base, out, {"target_parameters": STACKS, "target_modules": ["q_proj"]})
    configure(out, target_parameters=["expert.down_proj"])
    return out


def incomplete(base: Path, out: Path) -> Path:
    train(base, out, {"target_parameters": STACKS})
    rewrite(out, drop=lambda key: "layers.1." in key)
    return out


def whole(base: Path, out: Path) -> Path:
    train(base, out, {"target_modules": ["q_proj"]})
    path = out / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.mlp.experts.down_proj"
    save_file({**load_file(path), key: torch.ones(4, 96, 64)}, path)
    return out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (biases, r"experts\.lora_A\.weight is LoRA on .*gate_up_proj_bias, which is neither"),
        (rankless, r"have the shapes \(16, 64\) and \(192, 16\); LoRA of rank 5 on .*gate_up_proj"),
        (undeclared, r"base_layer\.lora_A\.weight, but its target_parameters name only down_proj"),
        (misspelt, r"base_layer\.lora_A\.weight, but its target_parameters name none of model"),
        (incomplete, r"lacks the factors of .*layers\.1\.mlp\.experts\.down_proj.*target_param"),
        (whole, r"experts\.down_proj replaces what all experts of a layer have in"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_its_key(
    make: Any, message: str, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny("gpt_oss")
    with pytest.raises(InputError, match=message):
        merge(base, [make(base, tmp_path / "adapter")], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
