"""Packed words as the formats' references have them, and unpack as the inverse of pack."""

from __future__ import annotations

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.formats import words as bits
from quantkit.formats.awq import AwqFormat
from quantkit.formats.format import Format
from quantkit.formats.gptq import GptqFormat
from quantkit.methods.grids import Grid, QuantizedTensor
from tests.helpers.codes import random_tensor, unsigned
from tests.helpers.stored import stored

AWQ, GPTQ, BF16 = AwqFormat(), GptqFormat(), torch.bfloat16


def test_awq_word_of_columns_0_to_7() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 128).contiguous()
    tensor = QuantizedTensor(Grid(4, 128, False), codes, torch.ones(8, 1), codes[:, :1])
    packed = AWQ.pack(tensor, BF16)
    assert unsigned(packed["qweight"][0, 0]) == 0x75316420
    assert unsigned(packed["qzeros"][0, 0]) == 0x75316420
    assert packed["qweight"].shape == (128, 1) and packed["scales"].shape == (1, 8)


def test_gptq_words_of_rows_0_to_7_and_of_symmetric_zeros() -> None:
    codes = torch.arange(32, dtype=torch.uint8).remainder(8).expand(32, 32).contiguous()
    zeros = torch.full((32, 1), 8, dtype=torch.uint8)
    tensor = QuantizedTensor(Grid(4, 32, True), codes, torch.ones(32, 1), zeros)
    packed = GPTQ.pack(tensor, BF16)
    assert unsigned(packed["qweight"][0, 0]) == 0x76543210
    assert {unsigned(word) for word in packed["qzeros"].flatten()} == {0x77777777}
    assert torch.equal(packed["g_idx"], torch.zeros(32, dtype=torch.int32))


def test_three_bits_straddle_words() -> None:
    codes = torch.zeros(32, 1, dtype=torch.uint8)
    codes[10] = 0b101  # bits 30 to 32 of the stream
    words = bits.pack(codes, 3)
    assert [unsigned(word) for word in words[:, 0]] == [1 << 30, 1, 0]


@pytest.mark.parametrize("width", range(2, 9))
def test_unpacking_inverts_packing(width: int) -> None:
    codes = torch.randint(0, 1 << width, (96, 5), dtype=torch.uint8)
    words = bits.pack(codes, width)
    assert words.dtype == torch.int32 and words.shape == (3 * width, 5)
    assert torch.equal(bits.unpack(words, width), codes)


@pytest.mark.parametrize(
    "grid", [Grid(4, 32, False), Grid(4, 128, True), Grid(4, -1, False)], ids=str
)
def test_awq_round_trip(grid: Grid) -> None:
    tensor = random_tensor(grid)
    config = AWQ.config(grid, {}, ["lm_head"], BF16)
    back = AWQ.unpack(stored(AWQ.pack(tensor, BF16), config))
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, part), getattr(tensor, part))


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_round_trip(width: int, symmetric: bool) -> None:
    grid = Grid(width, 32, symmetric, first_zero=1)
    tensor = random_tensor(grid)
    back = GPTQ.unpack(stored(GPTQ.pack(tensor, BF16), GPTQ.config(grid, {}, [], BF16)))
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, part), getattr(tensor, part))


def test_configs_hold_the_keys_that_engines_read() -> None:
    grid = Grid(4, 128, False)
    assert AWQ.config(grid, {}, ["lm_head"], BF16) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    base, other = Grid(4, 128, True, 1), Grid(8, 32, True, 1)
    config = GPTQ.config(base, {"a.b": base, "a.c": other}, ["a.d", "lm_head"], BF16)
    assert config["desc_act"] is False and config["sym"] is True
    assert config["checkpoint_format"] == "gptq"
    assert config["dynamic"] == {r"-:^a\.d$": {}, r"+:^a\.c$": {"bits": 8, "group_size": 32}}
    assert config["modules_in_block_to_quantize"] == [["a.b", "a.c"]]
    plain = GPTQ.config(base, {"a.b": base}, ["lm_head"], BF16)
    assert "dynamic" not in plain and "modules_in_block_to_quantize" not in plain


def test_exceptions_survive_the_config() -> None:
    base, other = Grid(4, 128, True, 1), Grid(8, 32, True, 1)
    config = GPTQ.config(base, {"a.b": base, "a.c": other}, [], BF16)
    tensor = random_tensor(other)
    back = GPTQ.unpack(stored(GPTQ.pack(tensor, BF16), config, "a.c"))
    assert torch.equal(back.codes, tensor.codes) and back.grid == other


def test_permuted_groups_are_others_and_read() -> None:
    grid = Grid(4, 32, True, 1)
    packed = GPTQ.pack(random_tensor(grid), BF16)
    linear = stored(packed, GPTQ.config(grid, {}, [], BF16))
    assert GPTQ.unpack(linear).groups is None
    packed["g_idx"] = packed["g_idx"].flip(0)
    back = GPTQ.unpack(linear)
    scales = back.scales.flip(1).repeat_interleave(32, 1)
    assert torch.equal(back.dequantize(), (back.codes.float() - 8) * scales)


@pytest.mark.parametrize(
    ("codec", "shape", "grid", "message"),
    [
        (AWQ, (64, 128), Grid(3, 128, False), "holds 4 bits only, not 3"),
        (AWQ, (64, 128), Grid(4, 64, False), "one group size"),
        (AWQ, (63, 128), Grid(4, 128, False), "divisible by 8"),
        (GPTQ, (64, 128), Grid(5, 128, True), "not 5"),
        (GPTQ, (60, 128), Grid(4, 128, True), "divisible by 32"),
        (GPTQ, (64, 128), Grid(4, 128, False), "one symmetry"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    codec: Format, shape: tuple[int, int], grid: Grid, message: str
) -> None:
    default = Grid(4, 128, codec is GPTQ)
    with pytest.raises(InputError, match=message):
        codec.check_scheme("m", shape, grid, default)
