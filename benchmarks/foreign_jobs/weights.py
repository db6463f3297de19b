"""What a peer's loaded model computes: its weights as a plain checkpoint, or its likelihoods.

Every linear is applied to the identity matrix, so that the result includes whatever the peer does
to weights when it runs. It doesn't include the rounding of inputs: for a model that rounds them,
``figures`` measures the model itself. Standard library, torch and safetensors only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@torch.inference_mode()
def save(model: nn.Module, original: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a checkpoint ``out`` of the tensors of ``original``, float32, as ``model`` has them.

    ``dtype``: of the activations that the model's linears take.
    """
    out.mkdir(parents=True)
    for file in original.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    config = json.loads((original / "config.json").read_text())
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    with safe_open(original / "model.safetensors", "pt") as file:
        keys = list(file.keys())
    tensors = {}
    for key in keys:
        path, _, leaf = key.rpartition(".")
        module = model.get_submodule(path)
        value: Any = getattr(module, leaf, None)
        if leaf == "weight" and _inputs(module):
            value = _weight(module, dtype)
        tensors[key] = value.detach().float().contiguous().clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def figures(model: nn.Module, original: nn.Module, rows: list[list[int]], out: Path) -> None:
    """Write perplexity and mean KL(original ‖ model) over all predicted tokens, as JSON."""
    losses, divergences = [], []
    for row in rows:
        ids = torch.tensor([row])
        p, q = (m(ids).logits[0, :-1].float().log_softmax(-1) for m in (original, model))
        losses.append(-q.gather(-1, ids[0, 1:, None]))
        divergences.append((p.exp() * (p - q)).sum(-1))
    perplexity = torch.cat(losses).double().mean().exp().item()
    kl = torch.cat(divergences).double().mean().item()
    out.write_text(json.dumps({"perplexity": perplexity, "kl": kl}))


def _inputs(module: nn.Module) -> int | None:
    """The number of a linear's inputs; None for any other module."""
    # Packed linears of the peers have the one name or the other.
    return getattr(module, "in_features", getattr(module, "infeatures", None))


def _weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a linear computes with, whatever it stores."""
    inputs = _inputs(linear)
    assert inputs is not None
    identity = torch.eye(inputs, dtype=dtype)
    rows = linear(identity[None])[0]
    bias = getattr(linear, "bias", None)
    return (rows if bias is None else rows - bias).T
