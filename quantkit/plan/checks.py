"""What a recipe can't have of a model, found from names and shapes alone, before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from quantkit.base.errors import InputError
from quantkit.base.names import starred
from quantkit.formats.format import Contents
from quantkit.formats.registry import FORMATS
from quantkit.methods.ggml.method import MixMethod
from quantkit.methods.grids import Grid
from quantkit.methods.linears import Scheme
from quantkit.methods.method import LinearMethod
from quantkit.model.skeleton import Skeleton
from quantkit.plan.candidates import fused

# What recipes call the output embedding, whatever its name; it is never quantized.
HEAD = "lm_head"


def check_patterns(method: LinearMethod, skeleton: Skeleton, linears: Collection[str]) -> None:
    """Raise InputError for a pattern of the recipe that matches nothing.

    A recipe may also ignore what is never quantized, such as a projector whose weight is a
    parameter of its own. The name of a module that holds linears isn't among that: whoever ignores
    "model.layers.0" means its linears, which only "model.layers.0.*" matches.
    """
    names = list(linears)
    others = _without_linears(skeleton, linears)
    for key, pattern in method.patterns():
        matched = [*names, *others, HEAD] if key == "quantize.ignore" else names
        if any(fnmatchcase(name, pattern) for name in matched):
            continue
        fix = f"Patterns are globs on full names such as {names[0]}."
        if any(fnmatchcase(name, f"{pattern}.*") for name in names):
            fix = f"Write {pattern}.* for the linears in it."
        raise InputError(f"pattern {pattern!r} matches no linear module", where=key, fix=fix)


def _without_linears(skeleton: Skeleton, linears: Collection[str]) -> set[str]:
    """Names of modules that hold no linear, and of the parameters that no linear has."""
    holders = {
        ".".join(parts[:count])
        for parts in (name.split(".") for name in linears)
        for count in range(len(parts) + 1)
    }
    modules = {name for name, _ in skeleton.model.named_modules()} - holders
    parameters = {name for name in skeleton.names if name.rpartition(".")[0] not in linears}
    return modules | parameters | {skeleton.key(name) for name in parameters}


def check_experts(method: LinearMethod, skeleton: Skeleton) -> None:
    """Raise InputError where the method or the format can't do a mixture of experts."""
    where = str(skeleton.directory)
    if why := FORMATS[method.format].without_experts:
        raise InputError(
            f"is a mixture of experts, which the {method.format} format can't hold: {why}",
            subject=where,
            fix="Use a recipe for another format, such as ct-w4a16-g128 or gptq-w4-g128.",
        )
    check_corrected(method, where)


def check_corrected(method: LinearMethod | MixMethod, where: str) -> None:
    """Raise InputError where the method sets the inputs of experts in two models side by side."""
    needs = method.needs()
    if needs is not None and needs.propagate == "corrected":
        raise InputError(
            "is a mixture of experts, whose tokens take other ways in the quantized model: their "
            "inputs in both models can't be set beside each other",
            subject=where,
            fix="Set quantize.propagate to original"
            + (" or quantized." if isinstance(method, LinearMethod) else "."),
        )


def unfit(
    method: LinearMethod,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    default: Scheme,
) -> dict[str, str]:
    """Why a linear can't have the recipe's scheme, by name; its fused siblings stay with it.

    Those are linears whose shape can't hold it, and those that no engine is known to run, unless
    these were more than half of the weights: on a GPU nobody has tried them.

    Raises InputError where the recipe gave the linear a scheme of its own, where it wants no
    exceptions, and where they would be more than half of the weights.
    """
    failed = _misfits(method.format, schemes, shapes, default)
    if method.unfit == "keep":
        more = failed | {
            name: InputError(f"transformers won't run it {why}", where=name)
            for name, why in not_run(method.format, schemes, shapes, anywhere=True).items()
        }
        failed = failed if _most(more, schemes, shapes) else more
    if not failed:
        return {}
    asked = any(schemes[name] != default for name in failed)
    if asked or _most(failed, schemes, shapes) or method.unfit == "refuse":
        raise _together(failed, len(schemes))
    reasons = {name: error.what for name, error in failed.items()}
    for siblings in fused(schemes):
        if first := next((name for name in siblings if name in failed), None):
            leaf = first.rpartition(".")[2]
            reason = f"engines load it as one matrix with {leaf}, which stays as it is"
            reasons |= {name: reason for name in siblings if name not in reasons}
    return reasons


def not_run(
    format_name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    *,
    anywhere: bool = False,
) -> dict[str, str]:
    """Why transformers won't run a linear, by name: its kernels are known to refuse some widths.

    anywhere: only linears that no other engine runs either.
    """
    refused = {}
    for name, scheme in schemes.items():
        engines = FORMATS[format_name].loading(Contents([scheme], [shapes[name]]))
        if anywhere and any(engine.loads != "no" for engine in engines):
            continue
        for engine in engines:
            if engine.engine == "transformers" and engine.loads == "no":
                refused[name] = engine.why
    return refused


def _most(
    chosen: Iterable[str], schemes: Iterable[str], shapes: Mapping[str, tuple[int, int]]
) -> bool:
    """Whether the chosen linears have more than half of the weights."""
    return 2 * _weights(chosen, shapes) > _weights(schemes, shapes)


def _misfits(
    format_name: str,
    schemes: Mapping[str, Scheme],
    shapes: Mapping[str, tuple[int, int]],
    default: Scheme,
) -> dict[str, InputError]:
    failed: dict[str, InputError] = {}
    for name, scheme in schemes.items():
        try:
            if isinstance(scheme, Grid):
                scheme.columns(shapes[name][1])
        except InputError as error:
            failed[name] = InputError(error.what, where=f"{name} (group_size)", fix=error.fix)
            continue
        try:
            FORMATS[format_name].check_scheme(name, shapes[name], scheme, default)
        except InputError as error:
            failed[name] = error
    return failed


def _together(failed: Mapping[str, InputError], count: int) -> InputError:
    """One error for all linears that have the same, or the user would meet them one at a time."""
    first = next(iter(failed.values()))
    alike = [name for name, error in failed.items() if error.what == first.what]
    if 1 < len(alike) < count:
        globs = ", ".join(dict.fromkeys(starred(name) for name in alike))
        fix = " ".join(filter(None, (first.fix, f"The same holds for {globs}.")))
        first = InputError(first.what, where=first.where, fix=fix)
    return first


def _weights(names: Iterable[str], shapes: Mapping[str, tuple[int, int]]) -> int:
    return sum(shapes[name][0] * shapes[name][1] for name in names)


def check_share(skeleton: Skeleton, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise InputError where most weights of the layers are in no linears."""
    prefix = skeleton.prefix + "."
    others = {
        name: value.numel()
        for name, value in skeleton.model.named_parameters()
        if name.startswith(prefix)
        and name.removesuffix(".weight") not in shapes
        and value.dim() > 1
    }
    inside = [name for name in shapes if name.startswith(prefix)]
    if sum(others.values()) <= _weights(inside, shapes):
        return
    largest = max(others, key=others.__getitem__)
    holder = skeleton.model.get_submodule(largest.rpartition(".")[0])
    raise InputError(
        f"most weights of the layers of {type(skeleton.model).__name__} are in no linears, such as "
        f"{starred(largest)} ({type(holder).__name__}), and would stay as they are",
        subject=str(skeleton.directory),
    )


def check_fused(schemes: Mapping[str, Scheme], names: Iterable[str]) -> None:
    for siblings in fused(names):
        if len({str(schemes.get(sibling)) for sibling in siblings}) > 1:
            parent, _, _ = siblings[0].rpartition(".")
            leaves = sorted(sibling.rpartition(".")[2] for sibling in siblings)
            raise InputError(
                f"{', '.join(leaves)} are loaded as one matrix by the engines and "
                "need the same scheme",
                where=parent,
                fix="Let the override match all of them.",
            )
