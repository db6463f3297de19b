"""Integer grids in GGUF: ggml's plain types hold the very values that were chosen."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from quantkit.assembly import blocks
from quantkit.assembly import gguf as assembly
from quantkit.base.errors import InputError
from quantkit.base.files import sha256
from quantkit.base.progress import Silent
from quantkit.checkpoint.reader import Checkpoint
from quantkit.checkpoint.weights import TensorSource
from quantkit.cli import app
from quantkit.commands.quantize import prepare, quantize
from quantkit.formats.gguf import grids as gguf_grids
from quantkit.formats.gguf.transforms import InterleaveHalves, Keep, ThreeParts
from quantkit.formats.packed import open_artifact
from quantkit.methods import rtn
from quantkit.methods.gptq.method import Gptq
from quantkit.methods.gptq.mix import GptqMix
from quantkit.methods.grids import Grid
from quantkit.methods.linears import BlockResult
from quantkit.model.skeleton import Skeleton
from quantkit.model.stream import Stream
from quantkit.plan.linears import LinearPlan
from quantkit.recipes.recipe import load_recipe
from tests.helpers.gguf_tiny import TEXT, checkpoint

pytest.importorskip("gguf")

IN_GGUF = ["quantize.format=gguf", "quantize.group_size=32"]
GRIDS = {
    "Q4_0": Grid(4, 32, True, exact_minimum=True),
    "Q4_1": Grid(4, 32, False, exact_minimum=True),
    "Q5_0": Grid(5, 32, True, exact_minimum=True),
    "Q5_1": Grid(5, 32, False, exact_minimum=True),
    "Q8_0": Grid(8, 32, True, exact_minimum=True),
}


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
@pytest.mark.parametrize("type", GRIDS)
def test_blocks_hold_the_very_values(type: str, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 128, generator=generator) + 0.3) * size
    tensor = rtn.quantize(weight, GRIDS[type])
    blocks = gguf_grids.pack_blocks(tensor, Keep())
    assert blocks.type == type
    assert blocks.blocks.numel() == gguf_grids.GgufFormat().nbytes(
        (24, 128), GRIDS[type], torch.float32
    )
    assert torch.equal(blocks.dequantize(), tensor.dequantize())
    assert set(tensor.codes.flatten().tolist()) >= {1, GRIDS[type].levels - 1} or size < 1e-5


@pytest.mark.parametrize("transform", [InterleaveHalves(8), ThreeParts(8)], ids=str)
def test_rows_move_with_their_scales(transform: InterleaveHalves | ThreeParts) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    tensor = rtn.quantize(weight, GRIDS["Q4_1"])
    stored = gguf_grids.pack_blocks(tensor, transform).dequantize()
    assert not torch.equal(stored, tensor.dequantize())
    assert torch.equal(transform.undo(stored), tensor.dequantize())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXT * 30), encoding="utf-8")
    return path


def calibrated(text: Path, *settings: str) -> list[str]:
    rows = f"{{dataset: {text}, samples: 4, sequence_length: 32}}"
    return [*IN_GGUF, f"calibration={rows}", *settings]


def logits(directory: Path, source: TensorSource) -> torch.Tensor:
    skeleton = Skeleton(Checkpoint(directory), torch.float32)
    rows = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(2))
    with Stream(skeleton, source, torch.device("cpu")).whole() as model, torch.no_grad():
        return model(rows).logits


class Blocks:
    """The blocks of one source, and the rest of another."""

    def __init__(self, blocks: TensorSource, rest: TensorSource) -> None:
        self.blocks, self.rest = blocks, rest

    def keys(self) -> Iterable[str]:
        return self.rest.keys()

    def read(self, key: str) -> torch.Tensor:
        return (self.blocks if ".layers." in key else self.rest).read(key)

    def read_rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        return self.read(key)[start:stop]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_awq_undoes_its_scales_in_the_file(tmp_path: Path, text: Path, model_type: str) -> None:
    """Norms are rescaled as each architecture stores them, and q's and k's rows move."""
    changes: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 96, "query_pre_attn_scalar": 96, "sliding_window": 24},
        "phi3": {"pad_token_id": 0},
    }
    model = checkpoint(tmp_path / "model", model_type=model_type, **changes.get(model_type, {}))
    settings = calibrated(text, "quantize.bits=8", "quantize.symmetric=true")
    job = prepare(load_recipe("awq-w4-g128", settings), str(model))
    quantize(job, tmp_path / "out", device="cpu", force=False, progress=Silent(), cache=False)
    source, artifact = Checkpoint(model), open_artifact(tmp_path / "out")
    norms = [key for key in source.entries if "layers" in key and "norm" in key]
    moved = [k for k in norms if not torch.equal(artifact.read(k), source.read(k).float())]
    assert len(moved) >= 2
    expected, actual = logits(model, source), logits(model, Blocks(artifact, source))
    assert (actual - expected).norm() < 0.03 * expected.norm()


def test_gptq_writes_what_it_chose(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes in the file are those that were chosen; bytes don't depend on where it was stopped."""
    model = checkpoint(tmp_path / "model")
    overrides = (
        "quantize.overrides=[{match: '*.down_proj', bits: 8}, "
        "{match: 'model.layers.0.self_attn.*', skip: true}]"
    )
    settings = calibrated(text, overrides)
    job = prepare(load_recipe("gptq-w4-g128", settings), str(model))
    chosen = {}
    original = blocks.quantize_linears

    def noting(plan: LinearPlan, index: int, *arguments: Any) -> BlockResult:
        result = original(plan, index, *arguments)
        prefix = plan.skeleton.layer_name(index)
        chosen.update({f"{prefix}.{name}": done.tensor for name, done in result.linears.items()})
        return result

    monkeypatch.setattr(assembly, "quantize_linears", noting)
    out = tmp_path / "out"
    manifest = quantize(job, out, device="cpu", force=False, progress=Silent(), cache=False)
    artifact = open_artifact(out)
    assert len(chosen) == 14 - 4
    for name, tensor in chosen.items():
        assert torch.equal(artifact.read(f"{name}.weight"), tensor.dequantize()), name
    types = artifact.types  # type: ignore[attr-defined]
    assert types["model.layers.1.mlp.down_proj.weight"] == "Q8_0"
    assert types["model.layers.1.self_attn.q_proj.weight"] == "Q4_0"
    assert types["model.layers.0.self_attn.q_proj.weight"] == "BF16"
    measured = {layer.name: layer.measured_on for layer in manifest.layers}
    assert measured["blk.1.attn_q.weight"] == "outputs"

    (file,) = out.glob("*.gguf")
    assert file.stat().st_size > job.plan.nbytes
    again = tmp_path / "again"

    def stopping(plan: LinearPlan, index: int, *arguments: Any) -> BlockResult:
        if index == 1:
            raise KeyboardInterrupt
        return original(plan, index, *arguments)

    monkeypatch.setattr(assembly, "quantize_linears", stopping)
    with pytest.raises(KeyboardInterrupt):
        quantize(job, again, device="cpu", force=False, progress=Silent(), cache=False)
    chosen.clear()
    monkeypatch.setattr(assembly, "quantize_linears", noting)
    quantize(job, again, device="cpu", force=False, progress=Silent(), cache=False)
    assert chosen and all(".1." in name for name in chosen)
    assert sha256(again / file.name) == sha256(file)


def test_mix_and_bits_tell_the_two_gptq_apart() -> None:
    assert isinstance(load_recipe("gguf-q4-k-m-gptq").recipe.quantize, GptqMix)
    assert isinstance(load_recipe("gptq-w4-g128", IN_GGUF).recipe.quantize, Gptq)
    with pytest.raises(InputError, match=r"quantize\.mix"):
        load_recipe("gguf-q4-k-m-gptq", ["quantize.mix=null"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantize.bits=3", "gguf format has no type for int3 g32"),
        ("quantize.group_size=128", "gguf format has no type for int4 g128"),
        ("quantize.bits=8", "gguf format has no type for int8 g32 asym"),
    ],
)
def test_what_no_type_holds_is_refused_before_work(
    tmp_path: Path, setting: str, message: str
) -> None:
    arguments = ["quantize", "rtn-w4-g128", "--model", "demo", "--out", str(tmp_path / "out")]
    for value in [*IN_GGUF, setting]:
        arguments += ["--set", value]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    text = " ".join(result.stderr.split())
    assert message in text and "Q4_0" in text and "compressed-tensors" in text
    assert not list(tmp_path.iterdir())
