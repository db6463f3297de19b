"""compressed-tensors: worked words, round trips, and its own library as an oracle."""

from __future__ import annotations

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.formats.compressed_tensors import CompressedTensorsFormat
from quantkit.methods.grids import Grid, QuantizedTensor
from tests.helpers.codes import random_tensor, unsigned
from tests.helpers.stored import stored

COMPRESSED, BF16 = CompressedTensorsFormat(), torch.bfloat16
GRIDS = [
    Grid(bits, size, symmetric)
    for bits in (2, 4, 8)
    for size in (32, -1)
    for symmetric in (True, False)
]


def exact(grid: Grid) -> QuantizedTensor:
    """A random tensor whose scales bf16 holds."""
    tensor = random_tensor(grid)
    return QuantizedTensor(grid, tensor.codes, tensor.scales.to(BF16).float(), tensor.zeros)


def test_words_of_the_codes_0_to_7() -> None:
    """Along the inputs the weights, along the outputs the zero points; the first lies lowest."""
    codes = torch.arange(8, dtype=torch.uint8).repeat(8, 4)
    zeros = torch.arange(8, dtype=torch.uint8)[:, None]
    tensor = QuantizedTensor(Grid(4, -1, False), codes, torch.ones(8, 1), zeros)
    packed = COMPRESSED.pack(tensor, BF16)
    assert packed["weight_packed"].shape == (8, 4)
    assert {unsigned(word) for word in packed["weight_packed"].flatten()} == {0x76543210}
    assert packed["weight_zero_point"].shape == (1, 1)
    assert unsigned(packed["weight_zero_point"][0, 0]) == 0x76543210
    assert packed["weight_shape"].tolist() == [8, 32]
    assert packed["weight_scale"].dtype == BF16


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_round_trip_and_size(grid: Grid) -> None:
    tensor = exact(grid)
    packed = COMPRESSED.pack(tensor, BF16)
    assert ("weight_zero_point" in packed) != grid.symmetric
    back = COMPRESSED.unpack(stored(packed, COMPRESSED.config(grid, {"m": grid}, [], BF16)))
    assert isinstance(back, QuantizedTensor) and back.grid == grid
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(back, part), getattr(tensor, part))
    assert sum(t.nbytes for t in packed.values()) == COMPRESSED.nbytes((64, 128), grid, BF16)
    assert COMPRESSED.weight_shape(stored(packed, {})) == (64, 128)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_its_own_library_reads_what_was_packed(grid: Grid) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    tensor = exact(grid)
    config = QuantizationConfig.model_validate(
        COMPRESSED.config(grid, {"m": grid}, ["lm_head"], BF16)
    )
    scheme = config.config_groups["group_0"]
    back = PackedQuantizationCompressor.decompress(COMPRESSED.pack(tensor, torch.float32), scheme)
    assert torch.equal(back["weight"], tensor.dequantize())


def test_a_group_for_each_grid_names_its_modules() -> None:
    base, other = Grid(4, 128, True), Grid(8, 32, False)
    plain = COMPRESSED.config(base, {"a.b": base, "a.c": base}, ["lm_head"], BF16)
    assert plain["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert plain["ignore"] == ["lm_head"]
    config = COMPRESSED.config(base, {"a.b": base, "a.c": other, "a.d": base}, [], BF16)
    groups = config["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a.b", "a.d"], ["a.c"]]
    tensor = exact(other)
    back = COMPRESSED.unpack(stored(COMPRESSED.pack(tensor, BF16), config, "a.c"))
    assert isinstance(back, QuantizedTensor) and back.grid == other
    assert torch.equal(back.codes, tensor.codes)


def test_configs_of_others_are_read() -> None:
    """Patterns go before classes; a module that none of them names has no grid."""
    config = COMPRESSED.config(Grid(4, 32, True), {"m": Grid(4, 32, True)}, [], BF16)
    fine = COMPRESSED.config(Grid(8, -1, True), {"m": Grid(8, -1, True)}, [], BF16)
    group = fine["config_groups"]["group_0"] | {"targets": [r"re:.*\.down_proj$"]}
    config["config_groups"]["group_1"] = group
    packed = COMPRESSED.pack(exact(Grid(8, -1, True)), BF16)
    back = COMPRESSED.unpack(stored(packed, config, "model.layers.0.mlp.down_proj"))
    assert isinstance(back, QuantizedTensor) and back.grid.bits == 8
    del config["config_groups"]["group_0"]
    with pytest.raises(InputError, match="none of the config_groups"):
        COMPRESSED.unpack(stored(packed, config, "model.layers.0.mlp.up_proj"))


def test_layouts_that_are_not_read_are_named() -> None:
    grid = Grid(4, 32, True)
    config = COMPRESSED.config(grid, {"m": grid}, [], BF16)
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    with pytest.raises(InputError, match="permuted groups"):
        COMPRESSED.unpack(stored(COMPRESSED.pack(exact(grid), BF16), config))
    config["config_groups"]["group_0"]["format"] = "nvfp4-pack-quantized"
    with pytest.raises(InputError, match="nvfp4-pack-quantized"):
        COMPRESSED.unpack(stored(COMPRESSED.pack(exact(grid), BF16), config))


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((64, 128), Grid(3, 128, True), "holds 2, 4, 8 bits, not 3"),
        ((64, 128), Grid(5, 128, True), "not 5"),
        ((64, 124), Grid(4, -1, True), "124 inputs aren't divisible by 8"),
        ((60, 128), Grid(4, 128, False), "60 outputs aren't divisible by 8"),
    ],
)
def test_what_it_cannot_hold_is_refused(shape: tuple[int, int], grid: Grid, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        COMPRESSED.check_scheme("m", shape, grid, grid)
    assert caught.value.fix
    COMPRESSED.check_scheme("m", (60, 128), Grid(4, 128, True), grid)
