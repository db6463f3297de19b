"""The weights that a peer's loaded model computes with, as a plain checkpoint.

Every linear is asked what it makes of the identity matrix, so whatever the peer does when it
runs is in the answer. Standard library, torch and safetensors only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@torch.inference_mode()
def save(model: nn.Module, original: Path, out: Path, dtype: torch.dtype) -> None:
    """Write to ``out`` what ``model`` has for each tensor of ``original``, in float32.

    ``dtype``: of the activations that its linears are given.
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
        value = getattr(module, leaf, None)
        if leaf == "weight" and hasattr(module, "in_features"):
            value = _weight(module, dtype)
        tensors[key] = value.detach().float().contiguous().clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _weight(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    identity = torch.eye(linear.in_features, dtype=dtype)
    rows = linear(identity[None])[0]
    bias = getattr(linear, "bias", None)
    return (rows if bias is None else rows - bias).T
