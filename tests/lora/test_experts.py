"""Adapters of attention on mixtures of experts, whose experts are one tensor or many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from quantkit.api import merge
from tests.helpers.tiny import Tiny


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_merge_is_pefts_and_leaves_the_experts_alone(
    model_type: str, tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny(model_type)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], out=tmp_path / "out")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    expected = loaded.merge_and_unload().state_dict()
    stored, before = (load_file(d / "model.safetensors") for d in (tmp_path / "out", base))
    assert stored.keys() == before.keys()
    for key, value in stored.items():
        if "q_proj.weight" in key or "o_proj.weight" in key:
            torch.testing.assert_close(value, expected[key])
            assert not torch.equal(value, before[key])
        else:
            assert torch.equal(value, before[key])
