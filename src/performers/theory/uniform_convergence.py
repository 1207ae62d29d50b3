"""How many projections approximate a whole attention matrix (Theorems 4 and 7)."""

from __future__ import annotations

import math

from performers.checks import check_number

__all__ = ["sufficient_projections"]


def sufficient_projections(
    epsilon: float,
    radius: float,
    dim: int,
    mean_square_length: float | None = None,
    largest_factor: float | None = None,
) -> float:
    """m, up to a constant factor, at which every entry of the attention matrix is within ε.

        m = dim/δ² · log(4 σ R / (δ dim^(1/4))),    δ = ε / h*²,    h* = exp(R² / (2 √dim))

    for orthogonal trigonometric features of queries and keys with norms up to `radius`, before the
    temperature dim^(−1/4). The number of queries and keys does not enter.

    Theorem 7 has the same for any radial kernel: `mean_square_length` is σ = E‖ω‖², dim unless
    given; `largest_factor` is g*h*, the largest product of the factors that turn the radial kernel
    into the attention kernel, h*² unless given. The theorems do not state the constant. So the
    result shows how m grows with ε, R and dim; it is not a number of projections to use.

    Raises ValueError for numbers that are not positive.
    Source: Choromanski et al. 2021, Theorem 4 and Theorem 7 (Appendix F.5).

    >>> round(sufficient_projections(epsilon=0.5, radius=1.0, dim=8))
    259
    """
    sigma = dim if mean_square_length is None else mean_square_length
    factor = math.exp(radius**2 / math.sqrt(dim)) if largest_factor is None else largest_factor
    numbers = {"epsilon": epsilon, "radius": radius, "dim": dim, "mean_square_length": sigma}
    for name, number in (numbers | {"largest_factor": factor}).items():
        check_number(name, number)
    delta = epsilon / factor
    return max(1.0, dim / delta**2 * math.log(4 * sigma * radius / (delta * dim**0.25)))
