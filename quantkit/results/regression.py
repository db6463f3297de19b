"""How an artifact answers the regression cases of a suite, beside the baseline's answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckOutcome:
    """One check of a case on either side, and why it failed."""

    check: str
    passed: bool
    baseline_passed: bool
    why: str | None
    baseline_why: str | None


@dataclass(frozen=True)
class CaseOutcome:
    """One regression case: what was answered, and whether that passed, on either side."""

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
    """Cases that pass, and how that differs from the baseline's.

    slice_cases: a tag with fewer cases is no slice for the worst slice to be looked for in.
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
        """Share of the cases' weight that passes."""
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
        """Passed by the baseline, failed now."""
        return sum(case.baseline_passed and not case.passed for case in self.cases)

    @property
    def broken_critical(self) -> int:
        return sum(c.baseline_passed and not c.passed and c.critical for c in self.cases)

    @property
    def fixed(self) -> int:
        """Failed by the baseline, passed now."""
        return sum(case.passed and not case.baseline_passed for case in self.cases)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags that cases have, in the order of the cases."""
        return tuple(dict.fromkeys(tag for case in self.cases for tag in case.tags))

    def tagged(self, tag: str) -> RegressionResult | None:
        """The cases with one tag alone, or None where there are none."""
        cases = tuple(case for case in self.cases if tag in case.tags)
        return RegressionResult(cases, self.slice_cases) if cases else None

    def slices(self) -> list[RegressionResult]:
        """The slices by tag that have enough cases."""
        found = (self.tagged(tag) for tag in self.tags)
        return [part for part in found if part and part.total >= self.slice_cases]

    @property
    def worst_slice(self) -> float | None:
        """The lowest pass rate of a slice."""
        return min((part.pass_rate for part in self.slices()), default=None)

    @property
    def worst_slice_difference(self) -> float | None:
        """The lowest difference of a slice to the baseline's pass rate on it."""
        return min((part.difference for part in self.slices()), default=None)
