"""The proof of a merge, where both ends of the model are read in slices: DoRA on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from quantkit.base.errors import QuantkitError
from quantkit.base.progress import Silent
from quantkit.commands.merge import merge
from quantkit.lora.changes import Factors
from tests.helpers.adapters import base_of, load, merged_by_peft, train
from tests.helpers.tiny import Tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize(
    ("model_type", "tied", "ends"),
    [
        ("llama", False, ["lm_head"]),
        ("llama", False, ["embed_tokens"]),
        ("llama", True, ["lm_head"]),
        ("llama", True, ["embed_tokens"]),
        ("llama", True, ["lm_head", "embed_tokens"]),
        ("gemma2", True, ["embed_tokens"]),
        ("gpt2", True, ["lm_head", "wte"]),
    ],
)
def test_dora_on_embedding_and_head_is_proven(
    tiny: Tiny, tmp_path: Path, model_type: str, tied: bool, ends: list[str]
) -> None:
    base = base_of(tiny, model_type, tie_word_embeddings=tied)
    adapter = train(base, tmp_path / "a", {"target_modules": ends, "use_dora": True})
    manifest = merge(str(base), [(str(adapter), 1.0)], tmp_path / "out", progress=Silent())
    assert manifest.untied == tied
    assert manifest.proof is not None and manifest.proof.difference < 1e-5
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, expected in merged_by_peft(load(base, untie=tied), adapter).items():
        assert (found[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name


def test_tied_magnitudes_are_those_of_the_adapter_at_run_time(tiny: Tiny, tmp_path: Path) -> None:
    base = base_of(tiny, "llama", tie_word_embeddings=True)
    config = {"target_modules": ["embed_tokens"], "use_dora": True, "ensure_weight_tying": True}
    adapter = train(base, tmp_path / "a", config)
    manifest = merge(str(base), [(str(adapter), 1.0)], tmp_path / "out", progress=Silent())
    assert manifest.proof is not None and manifest.proof.difference < 1e-5
    ids = torch.arange(40)[None]
    expected = PeftModel.from_pretrained(load(base), adapter).eval()(input_ids=ids).logits
    actual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_wrong_lengths_at_an_end_are_found(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    base = base_of(tiny, "llama")
    adapter = train(base, tmp_path / "a", {"target_modules": [end], "use_dora": True})
    lengths = Factors._lengths
    monkeypatch.setattr(Factors, "_lengths", lambda self, weight: lengths(self, weight) * 1.01)
    with pytest.raises(QuantkitError, match="logits differ"):
        merge(str(base), [(str(adapter), 1.0)], tmp_path / "out", progress=Silent())
    assert not (tmp_path / "out").exists()
