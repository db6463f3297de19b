"""How a model answers the regression cases of a suite, beside the baseline's answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckOutcome:
    """Whether one check of a case passes for either model, and the reason where it fails."""

    check: str
    passed: bool
    baseline_passed: bool
    why: str | None
    baseline_why: str | None


@dataclass(frozen=True)
class CaseOutcome:
    """The two models' answers to one regression case, and whether they pass all its checks."""

    id: str
    passed: bool
    baseline_passed: bool
    critical: bool
    tags: tuple[str, ...]
    answer: str
    baseline_answer: str
    weight: float = 1.0
    checks: tuple[CheckOutcome, ...] = ()


@dataclass(frozen=True)
class RegressionResult:
    """All cases, with the counts and rates that follow from them.

    slice_cases: the fewest cases that a tag must have to be searched for the worst slice.
    """

    cases: tuple[CaseOutcome, ...]
    slice_cases: int = 5

    @property
    def total(self) -> int:
        return len(self.cases)

    @property
    def passed(self) -> int:
        return sum(case.passed for case in self.cases)

    @property
    def pass_rate(self) -> float:
        return self.passed / self.total

    @property
    def weighted_pass_rate(self) -> float:
        """The share of the cases' total weight that passes."""
        return sum(c.weight for c in self.cases if c.passed) / sum(c.weight for c in self.cases)

    @property
    def baseline_passed(self) -> int:
        return sum(case.baseline_passed for case in self.cases)

    @property
    def difference(self) -> float:
        """The pass rate minus the baseline's."""
        return (self.passed - self.baseline_passed) / self.total

    @property
    def broken(self) -> int:
        """How many cases the baseline passes and this model fails."""
        return sum(case.baseline_passed and not case.passed for case in self.cases)

    @property
    def broken_critical(self) -> int:
        """How many of the broken cases are critical."""
        return sum(c.baseline_passed and not c.passed and c.critical for c in self.cases)

    @property
    def fixed(self) -> int:
        """How many cases the baseline fails and this model passes."""
        return sum(case.passed and not case.baseline_passed for case in self.cases)

    @property
    def tags(self) -> tuple[str, ...]:
        """Every tag of a case, in the order in which the cases bring them."""
        return tuple(dict.fromkeys(tag for case in self.cases for tag in case.tags))

    def tagged(self, tag: str) -> RegressionResult | None:
        """The cases with one tag, or None where there are none."""
        cases = tuple(case for case in self.cases if tag in case.tags)
        return RegressionResult(cases, self.slice_cases) if cases else None

    def slices(self) -> list[RegressionResult]:
        """The cases of each tag that has at least ``slice_cases`` of them."""
        by_tag = (self.tagged(tag) for tag in self.tags)
        return [part for part in by_tag if part and part.total >= self.slice_cases]

    @property
    def worst_slice(self) -> float | None:
        """The lowest pass rate of a slice; None without slices."""
        return min((part.pass_rate for part in self.slices()), default=None)

    @property
    def worst_slice_difference(self) -> float | None:
        """The lowest of the slices' differences from the baseline; None without slices."""
        return min((part.difference for part in self.slices()), default=None)
