"""The ``config_groups`` of compressed-tensors: which modules are quantized to which scheme.

Reference: compressed_tensors' ``quantization/quant_args.py`` and ``quantization/quant_scheme.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quantkit.base.errors import InputError
from quantkit.formats.format import expect
from quantkit.methods.fp8 import Fp8Scheme
from quantkit.methods.grids import Grid


def group_of_scheme(scheme: object, targets: list[str]) -> dict[str, Any]:
    """The group of ``targets`` (modules, or "Linear" for all) on a grid or in FP8."""
    layout, inputs = "pack-quantized", None
    if isinstance(scheme, Fp8Scheme):
        layout, weights = "float-quantized", _arguments(8, "float", "channel")
    else:
        grid = expect(scheme, Grid)
        strategy = "channel" if grid.group_size == -1 else "group"
        weights = _arguments(grid.bits, "int", strategy)
        weights["symmetric"] = grid.symmetric
        weights["group_size"] = None if grid.group_size == -1 else grid.group_size
        layout = "int-quantized" if grid.rounds_inputs else layout
    if layout != "pack-quantized":
        inputs = _arguments(8, weights["type"], "token") | {"dynamic": True, "observer": None}
    return {
        "targets": targets,
        "format": layout,
        "input_activations": inputs,
        "output_activations": None,
        "weights": weights,
    }


def _arguments(bits: int, type: str, strategy: str) -> dict[str, Any]:
    """The settings of the weights or of the inputs."""
    # All keys of QuantizationArgs: some versions refuse other keys, some need each of these.
    return {
        "num_bits": bits,
        "type": type,
        "symmetric": True,
        "strategy": strategy,
        "group_size": None,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def scheme_of_module(module: str, config: Mapping[str, Any]) -> Grid | Fp8Scheme:
    """What a module is rounded to. Raises InputError for a scheme that can't be read."""
    group = group_of_module(module, config)
    weights, inputs = group["weights"], group.get("input_activations")
    layout = group.get("format") or config["format"]
    bits, strategy = weights["num_bits"], weights["strategy"]
    if layout == "pack-quantized" and inputs is None and 2 <= bits <= 8:
        per_row = strategy == "channel"
        if per_row or strategy == "group":
            return Grid(bits, -1 if per_row else weights["group_size"], weights["symmetric"])
    static = inputs is not None and not inputs["dynamic"]
    fitting = bits == 8 and weights["symmetric"] and strategy in ("channel", "tensor")
    if inputs is not None:
        by = "tensor" if static else "token"
        fitting &= inputs["num_bits"] == 8 and inputs["symmetric"] and inputs["strategy"] == by
    if fitting and layout == "float-quantized" and weights["type"] == "float":
        return Fp8Scheme(strategy == "channel", inputs is not None, static)
    if fitting and layout == "int-quantized" and weights["type"] == "int":
        return Grid(8, -1, symmetric=True, rounds_inputs=inputs is not None)
    what = f", inputs {inputs['num_bits']} bits by {inputs['strategy']}" if inputs else ""
    raise InputError(
        f"is stored as {layout} ({bits} bits by {strategy}{what}), which can't be read",
        subject=module,
        fix="Can be read: pack-quantized by group or channel; int-quantized and float-quantized "
        "of 8 bits by channel or tensor, with inputs by token, static or left alone.",
    )


def group_of_module(module: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The group whose targets match a module: by name, else by a pattern, else by class.

    Raises InputError where none does.
    """

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], module) else None
        return {module: 0, "Linear": 2}.get(target)

    matches = [
        (place, number, group)
        for number, group in enumerate(config["config_groups"].values())
        for place in map(rank, group["targets"])
        if place is not None
    ]
    if not matches:
        raise InputError("is in none of the config_groups of config.json", subject=module)
    result: dict[str, Any] = min(matches, key=lambda item: item[:2])[2]
    return result
