"""Codes of 2 to 8 bits in 32-bit words: one continuous stream, the first code in the low bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along dimension 0: uint8 (n, m) with n·bits divisible by 32 → int32 (n·bits/32, m).

    Codes may straddle words (3 bits: 32 codes fill three words), as AutoGPTQ's do.
    """
    count, rest = codes.shape
    per_run = 32 // _common(bits)  # codes until a word boundary falls on a code boundary
    words_per_run = per_run * bits // 32
    runs = codes.view(count // per_run, per_run, rest)
    words = torch.zeros(runs.shape[0], words_per_run, rest, dtype=torch.int64, device=codes.device)
    for i in range(per_run):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i].to(torch.int64)
        words[:, word] |= (code << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return _signed(words.view(-1, rest))


def unpack(words: Tensor, bits: int) -> Tensor:
    """Inverse of ``pack``: int32 (w, m) → uint8 (w·32/bits, m)."""
    per_run = 32 // _common(bits)
    words_per_run = per_run * bits // 32
    runs = (words.to(torch.int64) & 0xFFFFFFFF).view(-1, words_per_run, words.shape[1])
    shape = runs.shape[0], per_run, words.shape[1]
    codes = torch.empty(shape, dtype=torch.uint8, device=words.device)
    for i in range(per_run):
        word, shift = divmod(i * bits, 32)
        code = runs[:, word] >> shift
        if shift + bits > 32:
            code |= runs[:, word + 1] << (32 - shift)
        codes[:, i] = (code & ((1 << bits) - 1)).to(torch.uint8)
    return codes.view(-1, words.shape[1])


def _common(bits: int) -> int:
    """Greatest power of two that divides ``bits``."""
    return bits & -bits


def _signed(words: Tensor) -> Tensor:
    """int64 holding unsigned 32-bit values → int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
