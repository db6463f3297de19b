"""What every format promises, tried on each that is registered and each scheme that it holds."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from quantkit.base.errors import InputError
from quantkit.formats.format import Contents, Format, SafetensorsFormat
from quantkit.formats.gguf import grids as gguf_grids
from quantkit.formats.gguf.transforms import Keep
from quantkit.formats.registry import FORMATS, safetensors_formats
from quantkit.methods import fp8, nf4, rtn
from quantkit.methods.fp8 import Fp8Scheme, Fp8Tensor
from quantkit.methods.grids import Grid, Quantized, QuantizedTensor
from quantkit.methods.nf4 import Nf4Scheme
from tests.helpers.stored import stored

BF16, SHAPE = torch.bfloat16, (64, 128)
GRIDS = [
    Grid(bits, size, symmetric)
    for bits in (2, 3, 4, 5, 8)
    for size in (32, -1)
    for symmetric in (True, False)
]
SCHEMES: list[object] = [
    *GRIDS,
    Grid(8, -1, True, rounds_inputs=True),
    Fp8Scheme(),
    Nf4Scheme(64, double_quant=True),
    Nf4Scheme(128, double_quant=False),
]


def fitted(format: Format, scheme: object) -> object:
    """The scheme with what the plan of a format adds to it."""
    if not isinstance(scheme, Grid):
        return scheme
    lowest = 0 if scheme.symmetric else format.lowest_zero
    return Grid(
        scheme.bits,
        scheme.group_size,
        scheme.symmetric,
        lowest,
        exact_minimum=format.exact_minimum,
        rounds_inputs=scheme.rounds_inputs,
    )


def holds(format: Format, scheme: object) -> bool:
    try:
        format.check_scheme("m", SHAPE, scheme, scheme)
    except InputError:
        return False
    return True


def quantized(scheme: object) -> Quantized:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) + 0.2
    if isinstance(scheme, Grid):
        return rtn.quantize(weight, scheme)
    if isinstance(scheme, Nf4Scheme):
        pytest.importorskip("bitsandbytes")
        return nf4.quantize(weight, scheme)
    return fp8.quantize(weight)


HELD = [
    pytest.param(format, fitted(format, scheme), id=f"{name} {scheme}")
    for name, format in FORMATS.items()
    for scheme in SCHEMES
    if holds(format, fitted(format, scheme))
]


@pytest.mark.parametrize(("format", "scheme"), HELD)
def test_what_is_held_comes_back_exactly_in_the_bytes_that_were_planned(
    format: Format, scheme: object
) -> None:
    tensor = quantized(scheme)
    if not isinstance(format, SafetensorsFormat):
        assert isinstance(tensor, QuantizedTensor)
        blocks = gguf_grids.pack_blocks(tensor, Keep())
        assert torch.equal(blocks.dequantize(), tensor.dequantize())
        assert blocks.blocks.nbytes == format.nbytes(SHAPE, scheme, BF16)
        return
    parts = format.pack(tensor, BF16)
    assert set(parts) <= set(format.suffixes) <= set(format.read_suffixes)
    assert set(parts) & set(format.markers)
    settings = format.dialect(format.config(scheme, {"m": scheme}, ["lm_head"], BF16)).settings
    linear = stored(parts, settings)
    assert torch.equal(format.unpack(linear).dequantize(), tensor.dequantize())
    # awq stores the zero points of symmetric grids too, so that they come back as asymmetric ones.
    assert str(format.scheme(linear)).split()[:2] == str(scheme).split()[:2]
    assert tuple(format.weight_shape(linear)) == SHAPE
    written = sum(part.nbytes for part in parts.values())
    # bitsandbytes stores JSON, whose length depends on the numbers in it.
    slack = 200 if isinstance(scheme, Nf4Scheme) else 0
    assert abs(written - format.nbytes(SHAPE, scheme, BF16)) <= slack


@pytest.mark.parametrize(("format", "scheme"), HELD)
def test_codes_are_packed_where_they_are(format: Format, scheme: object) -> None:
    """On a device that computes nothing, and refuses to mix with another."""
    tensor = quantized(scheme)
    if not isinstance(format, SafetensorsFormat) or isinstance(scheme, Nf4Scheme):
        return
    assert isinstance(tensor, QuantizedTensor | Fp8Tensor)
    on_cpu = format.pack(tensor, BF16)
    names = [field.name for field in fields(tensor) if field.name not in ("grid", "groups")]
    away = replace(tensor, **{name: getattr(tensor, name).to("meta") for name in names})
    parts = format.pack(away, BF16)
    described = {name: (part.shape, part.dtype) for name, part in parts.items()}
    assert described == {name: (part.shape, part.dtype) for name, part in on_cpu.items()}
    assert {part.device.type for name, part in parts.items() if name != "weight_shape"} == {"meta"}
    if "weight_shape" in parts:
        parts["weight_shape"] = on_cpu["weight_shape"]
    if "g_idx" not in parts:  # whose values are looked at
        settings = format.dialect(format.config(scheme, {"m": scheme}, [], BF16)).settings
        assert format.unpack(stored(parts, settings)).dequantize().device.type == "meta"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_held_is_refused_by_name(name: str) -> None:
    format = FORMATS[name]
    schemes = [fitted(format, scheme) for scheme in SCHEMES]
    refused = [scheme for scheme in schemes if not holds(format, scheme)]
    assert len(refused) < len(schemes), "it holds none of the schemes that this test knows"
    for scheme in refused:
        default = scheme if isinstance(scheme, format.holds) else schemes[0]
        with pytest.raises(InputError, match=name) as caught:
            format.check_scheme("a.linear", SHAPE, scheme, default)
        assert "a.linear" in str(caught.value)


@pytest.mark.parametrize("name", safetensors_formats())
def test_its_config_is_understood_as_its_own(name: str) -> None:
    format = safetensors_formats()[name]
    scheme = next(scheme for scheme in SCHEMES if holds(format, scheme))
    config = format.config(scheme, {"m": scheme}, [], BF16)
    assert config["quant_method"] == name
    assert format.dialect(config).format == name


@pytest.mark.parametrize("name", FORMATS)
def test_every_engine_loads_it_or_has_a_reason_not_to(name: str) -> None:
    for loading in FORMATS[name].loading(Contents()):
        assert loading.loads in ("yes", "no", "untried")
        assert loading.loads == "yes" or loading.why
