"""Means over runs with their standard errors, and what two of them decide."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Mean"]

# How many standard errors decide: what t exceeds by chance in one of twenty comparisons of two
# means over three runs each.
DECISIVE = 2.8


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error; None for that of a single run, which has none.

    >>> Mean.of([0.125, 0.135, 0.130]).percent()
    '13.00% ± 0.29'
    >>> (Mean.of([0.125, 0.135, 0.130]) - Mean(0.1, 0.0)).points()
    '+3.00 ± 0.29'
    """

    value: float
    error: float | None

    @classmethod
    def of(cls, samples: Sequence[float | int]) -> Mean:
        count = len(samples)
        error = statistics.stdev(samples) / count**0.5 if count > 1 else None
        return cls(statistics.fmean(samples), error)

    def __sub__(self, other: Mean) -> Mean:
        """The difference of two independent means."""
        if self.error is None or other.error is None:
            return Mean(self.value - other.value, None)
        return Mean(self.value - other.value, (self.error**2 + other.error**2) ** 0.5)

    def is_above_0(self) -> str:
        """ "yes" or "no"; "undecided" within 2.8 standard errors of 0, or without an error."""
        if self.error is None or abs(self.value) < DECISIVE * self.error:
            return "undecided"
        return "yes" if self.value > 0 else "no"

    def number(self) -> str:
        """With two decimals."""
        return f"{self.value:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")

    def percent(self) -> str:
        """A share in percent."""
        return f"{self.value:.2%}" + ("" if self.error is None else f" ± {100 * self.error:.2f}")

    def points(self) -> str:
        """A difference of shares in points of percent."""
        signed = f"{100 * self.value:+.2f}"
        return signed + ("" if self.error is None else f" ± {100 * self.error:.2f}")
