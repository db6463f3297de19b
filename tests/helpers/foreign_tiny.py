"""Checkpoints as other tools write them, packed bit by bit, without any of quantkit's packing.

Codes are laid out as a stream of bits (numpy's packbits, least significant first), so that words,
straddling and order follow from the formats' descriptions alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Array = np.ndarray[Any, np.dtype[Any]]
# A linear's tensors by suffix, and the weight that they represent.
Packed = tuple[dict[str, Any], torch.Tensor]


@dataclass(frozen=True)
class Coded:
    """A linear as integers: codes (N, K), scales and zeros (N, G), group of each column (K)."""

    codes: Array
    scales: Array
    zeros: Array
    groups: Array

    @property
    def weight(self) -> torch.Tensor:
        """The weight that it represents, by the formula w = (q - z) · s, float32."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        value = (self.codes.astype(np.float32) - zeros) * scales.astype(np.float32)
        return torch.from_numpy(value.astype(np.float32))


def code(
    weight: torch.Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    permuted: bool = False,
    lowest: int = 0,
) -> Coded:
    """Round a weight. ``lowest``: the smallest zero point there may be."""
    value = weight.float().numpy()
    columns = value.shape[1]
    order = np.random.default_rng(0).permutation(columns) if permuted else np.arange(columns)
    groups = np.empty(columns, np.int64)
    groups[order] = np.arange(columns) // group
    count, top = -(-columns // group), 2**bits - 1
    scales = np.empty((value.shape[0], count), np.float16)
    zeros = np.empty(scales.shape, np.int64)
    for index in range(count):
        part = value[:, groups == index]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, index] = 2 * np.maximum(-low, high) / top
            zeros[:, index] = 2 ** (bits - 1)
        else:
            scales[:, index] = (high - low) / top
            zeros[:, index] = np.clip(np.rint(-low / scales[:, index]), lowest, top)
    rounded = np.rint(value / scales[:, groups].astype(np.float32)) + zeros[:, groups]
    return Coded(np.clip(rounded, 0, top).astype(np.int64), scales, zeros, groups)


def stream(codes: Array, bits: int) -> Array:
    """Rows of codes (n, m) → rows of 32-bit words (n, m·bits/32), the first code lowest."""
    planes = (codes[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little")
    return packed.view("<u4").view(np.int32)


def gptq(coded: Coded, bits: int, *, version: int = 1, words: bool = False) -> dict[str, Any]:
    """GPTQ's tensors.

    ``words``: 1 is subtracted from whole words, as by GPTQModel, so that z = 0 borrows.
    """
    stored = coded.zeros.T if version == 2 or words else (coded.zeros.T - 1) % 2**bits
    qzeros = stream(stored, bits)
    if words:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = (qzeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
    return {
        "qweight": stream(coded.codes, bits).T,
        "qzeros": qzeros,
        "scales": coded.scales.T,
        "g_idx": coded.groups.astype(np.int32),
    }


def awq(coded: Coded) -> dict[str, Any]:
    """AutoAWQ's tensors, GEMM version."""

    def ordered(values: Array) -> Array:
        eights = values.reshape(len(values), -1, 8)[..., _AWQ_ORDER]
        return stream(eights.reshape(len(values), -1), 4)

    return {
        "qweight": ordered(coded.codes.T),
        "qzeros": ordered(coded.zeros.T),
        "scales": coded.scales.T,
    }


def compressed(coded: Coded, bits: int, *, padded: bool = False) -> dict[str, Any]:
    """compressed-tensors' pack-quantized. ``padded``: no code straddles two words."""

    def packed(codes: Array) -> Array:
        each = 32 // bits if padded else 32
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % each)))
        if not padded:
            return stream(codes, bits)
        words = codes.reshape(len(codes), -1, each).astype(np.int64) << np.arange(0, each) * bits
        return words.sum(-1).astype(np.uint32).view(np.int32)

    return {
        "weight_packed": packed(coded.codes),
        "weight_scale": coded.scales,
        "weight_zero_point": packed(coded.zeros.T).T,
        "weight_shape": np.array(coded.codes.shape, np.int64),
        "weight_g_idx": coded.groups.astype(np.int32),
    }


def write(
    source: Path,
    target: Path,
    settings: dict[str, Any] | None,
    pack: Callable[[str, torch.Tensor], Packed | None],
    *,
    biases: bool = False,
    beside: tuple[str, dict[str, Any]] | None = None,
) -> dict[str, torch.Tensor]:
    """A quantized copy of a checkpoint; returns the weights that it represents.

    ``pack``: a linear's name and weight → what it is packed as; None leaves it as it is.
    ``biases``: every linear gets one of zeros. ``beside``: a file for settings outside config.json.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for key, weight in load_file(source / "model.safetensors").items():
        name = key.removesuffix(".weight")
        packed = pack(name, weight) if name.endswith(LINEARS) else None
        if packed is None:
            tensors[key] = expected[key] = weight
            continue
        parts, expected[key] = packed
        for suffix, part in parts.items():
            value = part if isinstance(part, torch.Tensor) else torch.from_numpy(part.copy())
            tensors[f"{name}.{suffix}"] = value.contiguous()
        if biases:
            tensors[f"{name}.bias"] = torch.zeros(weight.shape[0], dtype=torch.float16)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    (target / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (target / beside[0]).write_text(json.dumps(beside[1]))
    return expected
