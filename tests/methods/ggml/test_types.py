"""ggml's types: sizes of their blocks, and what can be done without llama.cpp's library."""

from __future__ import annotations

import pytest

from quantkit.base.errors import InputError
from quantkit.methods.ggml import library
from quantkit.methods.ggml.types import CASTS, PORTABLE, TYPES, available, block_size, row_bytes

pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("type", "elements", "size"), [("F32", 1, 4), ("Q8_0", 32, 34), ("Q4_K", 256, 144)]
)
def test_a_row_has_the_bytes_of_its_blocks(type: str, elements: int, size: int) -> None:
    assert block_size(type) == (elements, size)
    assert row_bytes(type, 3 * elements) == 3 * size


@pytest.mark.parametrize("type", TYPES)
def test_no_quantized_type_is_larger_than_its_cast(type: str) -> None:
    elements, size = block_size(type)
    width = CASTS[type].itemsize if type in CASTS else 2
    assert size <= width * elements


def test_sizes_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="unknown ggml type 'Q8_1'"):
        block_size("Q8_1")
    with pytest.raises(InputError, match="rows of 192 can't be cut into Q4_K's blocks of 256"):
        row_bytes("Q4_K", 192)


def test_without_llama_cpp_the_portable_types_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load_quantizer", lambda: None)
    assert available() == (*CASTS, *PORTABLE)
