"""Every registered method keeps what a method promises; a new one is tested by its line there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import nn

from quantkit.base import resources
from quantkit.base.errors import MachineError
from quantkit.documents.document import read_yaml
from quantkit.methods.linears import BlockResult, Linears
from quantkit.methods.method import LinearMethod, Method
from quantkit.methods.registry import METHODS, tag_of, with_trait
from quantkit.recipes.recipe import load_recipe
from tests.helpers.measured_block import MeasuredBlock, measured_block

LINEAR_METHODS = {tag: cls for tag, cls in METHODS.items() if issubclass(cls, LinearMethod)}
RECIPES = sorted(path.stem for path in resources.recipes().glob("*.yaml"))
PREFIX = "model.layers.0."


def tags(cls: type[Any]) -> Iterator[str]:
    """The tags of all subclasses of ``cls``."""
    for subclass in cls.__subclasses__():
        if "tag" in vars(subclass):
            yield subclass.tag
        yield from tags(subclass)


def recipe_of(cls: type[Method]) -> str:
    """The name of a shipped recipe of a method."""
    return next(name for name in RECIPES if type(load_recipe(name).recipe.quantize) is cls)


def test_every_method_is_registered_by_a_tag_of_its_own() -> None:
    assert sorted(METHODS) == sorted(tags(Method))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_described_by_one_method_only(name: str) -> None:
    section = read_yaml(resources.recipes() / f"{name}.yaml")["quantize"]
    described = [cls for cls in METHODS.values() if cls.describes(section)]
    assert described == [type(load_recipe(name).recipe.quantize)]
    assert METHODS[str(tag_of(section))] is described[0]


def test_a_section_of_no_method_has_no_tag() -> None:
    assert tag_of({"method": "none"}) is None and tag_of({}) is None


@pytest.mark.parametrize("tag", METHODS)
def test_the_name_in_a_recipe_is_that_of_the_class(tag: str) -> None:
    [name] = get_args(METHODS[tag].model_fields["method"].annotation)
    assert tag.startswith(name)


@pytest.mark.parametrize("tag", METHODS)
def test_what_is_measured_agrees_with_the_calibration_section(tag: str) -> None:
    cls = METHODS[tag]
    method = load_recipe(recipe_of(cls)).recipe.quantize
    assert (method.needs() is None) == (cls.calibration == "unused")


@pytest.fixture(scope="module")
def demo_block() -> MeasuredBlock:
    return measured_block(resources.demo_model())


def quantized(tag: str, measured: MeasuredBlock) -> tuple[Linears, BlockResult]:
    """The first block of the demo by a shipped recipe of the method."""
    method = load_recipe(recipe_of(METHODS[tag])).recipe.quantize
    assert isinstance(method, LinearMethod)
    try:
        method.check_available()
    except MachineError as error:
        pytest.skip(str(error))
    names = [name for name, m in measured.block.named_modules() if isinstance(m, nn.Linear)]
    schemes = {name: method.default_scheme() for name in names}
    measures = method.needs() is not None
    inputs, folds = (measured.inputs, measured.folds) if measures else ([], [])
    linears = Linears.of(measured.block, schemes, inputs, folds, PREFIX)
    return linears, method.quantize(linears)


@pytest.mark.parametrize("tag", LINEAR_METHODS)
def test_each_linear_is_quantized_and_reported_by_its_name(
    tag: str, demo_block: MeasuredBlock
) -> None:
    linears, result = quantized(tag, demo_block)
    assert set(result.linears) == set(linears.schemes)
    for name, linear in result.linears.items():
        assert linear.report.name == PREFIX + name
        assert linear.report.scheme == str(linears.schemes[name])
        assert 0 < linear.report.error < 0.1
        assert linear.tensor.shape == tuple(linears.weights[name].shape)
        value = linear.tensor.dequantize()
        assert value.dtype == torch.float32 and value.shape == linear.tensor.shape
        assert value.isfinite().all()


@pytest.mark.parametrize("tag", LINEAR_METHODS)
def test_the_block_computes_nearly_the_same_and_is_not_changed(
    tag: str, demo_block: MeasuredBlock
) -> None:
    before = demo_block.output()
    _, result = quantized(tag, demo_block)
    assert torch.equal(demo_block.output(), before)
    assert METHODS[tag].rescales or not result.changed
    after = demo_block.output(demo_block.replaced(result))
    assert (after - before).norm() < 0.1 * before.norm()


@pytest.mark.parametrize("tag", LINEAR_METHODS)
def test_the_same_inputs_give_the_same_bytes_on_any_number_of_threads(
    tag: str, demo_block: MeasuredBlock
) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantized(tag, demo_block)[1])
    finally:
        torch.set_num_threads(threads)
    first, second = results
    for name, linear in first.linears.items():
        assert torch.equal(linear.tensor.dequantize(), second.linears[name].tensor.dequantize())
        assert linear.report == second.linears[name].report
    for name, value in first.changed.items():
        assert torch.equal(value, second.changed[name])


@pytest.mark.parametrize("tag", LINEAR_METHODS)
def test_schemes_and_traits_agree(tag: str) -> None:
    method = load_recipe(recipe_of(METHODS[tag])).recipe.quantize
    assert isinstance(method, LinearMethod)
    scheme = method.default_scheme()
    assert scheme.rounds_inputs is METHODS[tag].rounds_inputs
    assert (tag in with_trait("rounds_inputs")) is METHODS[tag].rounds_inputs
    assert method.scheme_of("lm_head", scheme) is None
    assert method.scheme_of("model.layers.0.mlp.up_proj", scheme) == scheme
