"""Experts that too few calibration tokens are routed to, and what is measured of them instead."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from quantkit.calibration.statistics import InputStatistics
from quantkit.model.experts import Experts

# An input's second moment has as many directions as features, and a token shows one of them.
_FEATURES_PER_TOKEN = 4

# The numbers of experts, by the name of the module that holds them.
Chosen = dict[str, set[int]]


def count_routed(experts: Mapping[str, Experts], inputs: Sequence[InputStatistics]) -> None:
    """Note how many tokens were routed to each expert, in the statistics of what it reads."""
    for group in inputs:
        if any(_expert_of(name, experts) for name in group.consumers):
            group.routed = dict.fromkeys(group.consumers, group.tokens)


def too_few(
    experts: Mapping[str, Experts], inputs: Sequence[InputStatistics], measured: Collection[str]
) -> Chosen:
    """The experts that fewer tokens reached than a quarter of the features that they read.

    measured: the names of the linears that were looked at.
    """
    reached = {name: group for group in inputs for name in group.consumers}
    chosen: Chosen = {}
    for module, mixture in experts.items():
        for number, linears in enumerate(mixture.linears()):
            if f"{module}.{number}.{linears[0]}" not in measured:
                continue
            groups = [reached.get(f"{module}.{number}.{leaf}") for leaf in linears]
            if any(g is None or g.tokens * _FEATURES_PER_TOKEN < g.width for g in groups):
                chosen.setdefault(module, set()).add(number)
    return chosen


def linears_of(experts: Mapping[str, Experts], chosen: Chosen) -> list[str]:
    """Names, within the block, of the linears of the chosen experts."""
    return [
        f"{module}.{number}.{leaf}"
        for module, numbers in chosen.items()
        for number in sorted(numbers)
        for leaf in experts[module].linears()[number]
    ]


@contextmanager
def all_tokens(experts: Mapping[str, Experts], chosen: Chosen) -> Iterator[None]:
    """Run the chosen experts on all tokens, for the sake of who watches; outputs stay the same."""
    with ExitStack() as stack:
        for module, numbers in chosen.items():
            stack.enter_context(experts[module].watched(numbers))
        yield


def replaced(
    inputs: Sequence[InputStatistics], others: Sequence[InputStatistics]
) -> list[InputStatistics]:
    """``inputs`` with those of ``others`` in the place of what the same linears read."""
    routed = {name: group.tokens for group in inputs for name in group.consumers}
    for group in others:
        group.routed = {name: routed.get(name, 0) for name in group.consumers}
    names = {name for group in others for name in group.consumers}
    return [group for group in inputs if not names & set(group.consumers)] + list(others)


def _expert_of(name: str, experts: Mapping[str, Experts]) -> bool:
    return any(name.startswith(f"{module}.") for module in experts)
