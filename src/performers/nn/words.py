"""Words for φ, the same for models and for conversions.

`PerformerConfig(attention="performer-positive")` and `FavorOptions(features="positive")` mean the
same features. A word is "sharp", or a row of `ESTIMATORS` or `KERNELS`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from performers.checks import check_choice
from performers.functional.projections import PROJECTIONS
from performers.functional.sharp import QUERY_RATIO
from performers.kernels import KERNELS
from performers.nn.estimators import ESTIMATORS, Estimator
from performers.nn.feature_maps import KernelFeatures, SoftmaxFeatures
from performers.nn.sharp import SharpFeatures

__all__ = ["FEATURES", "SHARP", "build_features", "check_features", "estimator_of", "takes_window"]

SHARP = "sharp"

# A view: a row that is added to one of the tables is a word here. Sharp features are positive ones
# of queries and keys that were moved.
FEATURES: Mapping[str, Any] = ChainMap[str, Any](
    KERNELS,
    ESTIMATORS,
    {SHARP: ESTIMATORS["positive"]},  # the last comes first when one iterates
)


def estimator_of(features: str) -> Estimator | None:
    """The row of an estimate of the softmax kernel; None for features of another kernel."""
    row = FEATURES[features]
    return row if isinstance(row, Estimator) else None


def takes_window(features: str) -> bool:
    """Whether exact softmax scores can stand beside what these features estimate."""
    estimator = estimator_of(features)
    return estimator is not None and estimator.side is not None


def check_features(features: str, projection: str | None, distribution: str = "gaussian") -> None:
    """Raise ValueError for unknown features, and for words that do not go together with them."""
    check_choice("features", features, FEATURES)
    if projection is None and estimator_of(features) is not None:
        raise ValueError(
            f"features {features!r} need random projections: projection is None. Choose one of "
            f"{sorted(PROJECTIONS)}."
        )
    if features == SHARP and distribution != "gaussian":
        raise ValueError(
            f"features {features!r} need distribution='gaussian', got {distribution!r}."
        )


def build_features(
    features: str,
    dim: int,
    num_projections: int,
    *,
    num_heads: int = 1,
    statistics: str = "calibrated",
    has_window: bool = False,
    projection: str | None = "orthogonal",
    distribution: str = "gaussian",
    kernel_epsilon: float = 1e-3,
    seed: int = 0,
    layer: int = 0,
) -> SharpFeatures | SoftmaxFeatures | KernelFeatures:
    """φ of this name, for one attention layer.

    `num_heads`, `statistics` and `has_window` matter to sharp features: key heads, where they
    learn, and whether a window stands beside them. `kernel_epsilon` matters to kernels.

    Raises ValueError where `check_features` does.
    """
    check_features(features, projection, distribution)
    if estimator_of(features) is None:
        return KernelFeatures(
            dim, num_projections, features, kernel_epsilon, projection, distribution, seed, layer
        )
    assert projection is not None, "`check_features` refuses estimates of softmax without omega"
    if features == SHARP:
        return SharpFeatures(
            dim,
            num_projections,
            num_heads,
            statistics=statistics,
            query_ratio=1.0 if has_window else QUERY_RATIO,
            projection=projection,
            seed=seed,
            layer=layer,
        )
    return SoftmaxFeatures(dim, num_projections, features, projection, distribution, seed, layer)
