"""What was found wrong with an estimate, head by head."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from performers.records import aligned

__all__ = ["Diagnosis", "HeadDiagnosis", "short"]


# An expansion in 1/m describes errors below this.
RESOLVABLE = 1.0


@dataclass(frozen=True)
class HeadDiagnosis:
    """One query head, averaged over the batch. Errors are relative: ‖out − exact‖ / ‖exact‖.

    observed_error:     with the feature map as it is, its own ω.
    expected_error:     the root of the closed form `theory.mse_attention` for independent ω, which
                        is of first order in 1/m. From 1 on it only says that m is far too small:
                        tables say "not resolvable". None where there is no such form: for
                        distribution "sphere", and for estimators without a joint moment.
    uniform_error:      of averaging the visible values, what no estimate should be worse than.
    effective_features: (Σ_m u_m)² / Σ_m u_m², u_m the part of feature m in a query's normalizer:
                        how many features of the m carry the estimate. Keys in a window do not
                        count; 0 where no key is estimated.
    query_norm, …:      mean and largest ‖q‖ and ‖k‖, times √scale.
    mean_square_sum:    E‖q + k‖² over all pairs, in the coordinates of φ: sharp features lower it.
                        The variance grows like its exponential.
    predicted_projections: the m at which the closed form meets the target.
    smallest_projections:  the smallest m tried that met it; None where none did.
    """

    observed_error: float
    expected_error: float | None
    uniform_error: float
    effective_features: float
    query_norm: float
    largest_query_norm: float
    key_norm: float
    largest_key_norm: float
    mean_square_sum: float
    predicted_projections: float | None = None
    smallest_projections: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `str` makes a table of it."""

    heads: tuple[HeadDiagnosis, ...]
    num_projections: int
    target_error: float | None = None
    max_projections: int | None = None

    def mean(self, name: str) -> float:
        """The mean over heads of a number of `HeadDiagnosis`; infinite where one is missing."""
        numbers = [getattr(head, name) for head in self.heads]
        return sum(math.inf if x is None else x for x in numbers) / len(numbers)

    def __str__(self) -> str:
        columns = ["head", "observed", "expected", "uniform", f"of {self.num_projections}"]
        columns += ["|q|", "max", "|k|", "max", "E|q+k|²"]
        rows = [
            [str(index), *map(short, astuple(head)[: len(columns) - 1])]
            for index, head in enumerate(self.heads)
        ]
        for row, head in zip(rows, self.heads, strict=True):
            if head.expected_error is not None and not head.expected_error < RESOLVABLE:
                row[columns.index("expected")] = "not resolvable"
        if self.target_error is not None:
            columns += ["m predicted", "m found"]
            for row, head in zip(rows, self.heads, strict=True):
                found = head.smallest_projections
                predicted = head.predicted_projections
                assert self.max_projections is not None, "there is a target"
                is_beyond = predicted is not None and not predicted <= self.max_projections
                row.append(f"> {self.max_projections}" if is_beyond else short(predicted))
                row.append(f"> {self.max_projections}" if found is None else str(found))
        legend = (
            "Errors are relative to exact attention; uniform: averaging the values; "
            f"of {self.num_projections}: features that carry the estimate; not resolvable: m is "
            "far too small for the closed form."
        )
        if self.target_error is not None:
            legend += f" m predicted, found: for an error of {self.target_error:g}."
        return "\n".join([*aligned([columns, *rows]), legend])


def short(x: float | int | None) -> str:
    """A number in a few characters; a dash where there is none."""
    if x is None:
        return "–"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.0f}" if abs(x) < 1e5 else f"{x:.0e}"
