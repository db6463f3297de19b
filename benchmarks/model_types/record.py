"""What one model type got: run in a process of its own, since some types crash or hang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.model_types.tiny import build

GRID = {"bits": 4, "group_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", **GRID, "symmetric": False, "format": "awq"},
    "gptq": {"method": "gptq", **GRID, "symmetric": True, "format": "gptq"},
    "awq": {"method": "awq", **GRID, "symmetric": False, "format": "awq"},
    "nf4": {"method": "nf4", "block_size": 64, "double_quant": True, "format": "bitsandbytes"},
    "compressed-tensors": {
        "method": "gptq",
        **GRID,
        "symmetric": True,
        "format": "compressed-tensors",
    },
}
_TEXT = "The quick brown fox jumps over the lazy dog, and 0123456789 (x) + [y] = {z}; why? Ask!\n"


@dataclass
class Row:
    """One model type. kind: lm or vlm; built: why it couldn't be made, empty where it was;
    outcomes: by recipe, ``done`` or a reason; share: of the layers' weights that were quantized;
    crashed: recipes that ended in no error of ours; difference: the largest of the streamed
    logits from those of transformers, over the largest of these, both in float32.
    """

    kind: str
    model_type: str
    class_name: str
    built: str = ""
    outcomes: dict[str, str] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    crashed: list[str] = field(default_factory=list)
    difference: float | None = None
    experts: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record(kind: str, model_type: str, class_name: str, folder: Path) -> Row:
    """Build the type in ``folder`` and try every recipe on it."""
    row = Row(kind, model_type, class_name)
    model = folder / "model"
    try:
        build(model_type, class_name, model)
        whole = _loaded(model, class_name)
    except Exception as error:
        row.built = _reason(error)
        return row
    try:
        with torch.inference_mode():
            expected = whole(input_ids=_rows(), use_cache=False).logits
    except Exception:  # such as one that asks for an image beside the text
        expected = None
    (folder / "text.txt").write_text(_TEXT * 20)
    for name, quantize in RECIPES.items():
        _try(row, name, quantize, model, folder)
    try:
        streamed, row.experts = _streamed(model)
        if expected is not None:
            row.difference = float((streamed - expected).abs().max() / expected.abs().max())
    except Exception as error:
        row.outcomes.setdefault("eval", _reason(error))
    return row


def _try(row: Row, name: str, settings: Mapping[str, Any], model: Path, folder: Path) -> None:
    from quantkit.api import quantize
    from quantkit.base.errors import QuantkitError

    content: dict[str, Any] = {"schema": 1, "name": name, "version": "1.0.0"}
    content["quantize"] = dict(settings)
    if settings["method"] in ("gptq", "awq"):
        rows = {"samples": 8, "sequence_length": 64, "seed": 0}
        content["calibration"] = {"dataset": "text.txt", **rows}
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content))
    try:
        manifest = quantize(recipe, model=model, out=folder / name, cache=False, device="cpu")
    except QuantkitError as error:
        row.outcomes[name] = _reason(error)
    except Exception as error:
        row.outcomes[name] = f"{type(error).__name__}: {_reason(error)}"
        row.crashed.append(name)
    else:
        row.outcomes[name] = "done"
        row.share[name] = _share(model, {layer.name for layer in manifest.layers})


def _share(model: Path, quantized: set[str]) -> float:
    """Quantized weights over all of the layers' with two axes or more."""
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.model.skeleton import Skeleton

    skeleton = Skeleton(Checkpoint(model))
    inside = {
        name: value.numel()
        for name, value in skeleton.model.named_parameters()
        if name.startswith(f"{skeleton.prefix}.") and value.dim() > 1
    }
    done = sum(n for name, n in inside.items() if name.removesuffix(".weight") in quantized)
    return done / max(1, sum(inside.values()))


def _rows() -> Tensor:
    return torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def _loaded(directory: Path, class_name: str) -> Any:
    import transformers

    model = getattr(transformers, class_name).from_pretrained(directory, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def _streamed(directory: Path) -> tuple[Tensor, bool]:
    from quantkit.checkpoint.reader import Checkpoint
    from quantkit.model.skeleton import Skeleton
    from quantkit.model.stream import Stream, slices

    checkpoint = Checkpoint(directory)
    skeleton = Skeleton(checkpoint, torch.float32)
    stream = Stream(skeleton, checkpoint, torch.device("cpu"))
    [batch] = stream.begin(_rows(), 2)
    for index in range(len(skeleton.layers)):
        with stream.block(index) as block:
            stream.advance(index, block, [batch])
    with stream.head() as logits:
        parts = [logits(batch, part) for part in slices(stream.vocabulary)]
    return torch.cat(parts, -1), skeleton.has_experts


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
