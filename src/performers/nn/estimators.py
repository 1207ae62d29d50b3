"""The estimators of the softmax kernel, one row each: all that the rest of the package asks of one.

To add one, write its features beside the others in `performers.functional.features` and its row
here. Attention, models, conversion and `diagnose` read the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from performers.functional.features import (
    hyperbolic_features,
    hyperbolic_side,
    positive_features,
    positive_side,
    trigonometric_features,
)
from performers.theory import (
    log_joint_moment_hyperbolic,
    log_joint_moment_positive,
    log_joint_moment_trigonometric,
)
from performers.typing import Features, LogLinearSide

__all__ = ["ESTIMATORS", "Estimator"]


class Estimator(NamedTuple):
    """Random features φ with E[φ(x)·φ(y)] = exp(x·y).

    `features`: (x, ω) ↦ φ(x), of width `features_per_projection` · m for m rows of ω.
    `is_nonnegative`: whether φ(x)·φ(y) ≥ 0 always.
    `side`: ω ↦ the same features not multiplied out, where they are exponentials of linear
    functions. Exact scores can stand beside such features only, and fast backends want them.
    `log_joint_moment`: (q, k) ↦ log J, see `performers.theory.output_error`; without it `diagnose`
    has no expected error.
    """

    features: Callable[[Tensor, Tensor], Features]
    features_per_projection: int = 1
    is_nonnegative: bool = False
    side: Callable[[Tensor], LogLinearSide] | None = None
    log_joint_moment: Callable[[Tensor, Tensor], Tensor] | None = None


ESTIMATORS: dict[str, Estimator] = {
    "positive": Estimator(
        positive_features,
        is_nonnegative=True,
        side=positive_side,
        log_joint_moment=log_joint_moment_positive,
    ),
    "hyperbolic": Estimator(
        hyperbolic_features,
        features_per_projection=2,
        is_nonnegative=True,
        side=hyperbolic_side,
        log_joint_moment=log_joint_moment_hyperbolic,
    ),
    "trigonometric": Estimator(
        trigonometric_features,
        features_per_projection=2,
        log_joint_moment=log_joint_moment_trigonometric,
    ),
}
