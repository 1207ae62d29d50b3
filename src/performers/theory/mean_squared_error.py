"""Mean squared errors of the estimators of exp(x·y) with independent projections (Lemma 2).

All estimators are unbiased, so these are variances as well.
"""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from performers.theory.regularized_kernel import regularized_ratio
from performers.theory.vectors import softmax_kernel, square_norm

__all__ = [
    "mse_hyperbolic",
    "mse_optimal_positive",
    "mse_positive",
    "mse_regularized",
    "mse_trigonometric",
    "optimal_positive_parameter",
]


def mse_trigonometric(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], num_projections: int
) -> Float[Tensor, "*batch"]:
    """MSE of SM^trig: large where the kernel is small.

        exp(‖x + y‖²) SM(x, y)⁻² (1 − exp(−‖x − y‖²))² / (2m)

    Source: Choromanski et al. 2021, Lemma 2.
    """
    spread = -(-square_norm(x - y)).expm1()
    scale = (square_norm(x) + square_norm(y)).exp()  # = exp(‖x + y‖²) SM⁻²
    return scale * spread.square() / (2 * num_projections)


def mse_positive(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], num_projections: int
) -> Float[Tensor, "*batch"]:
    """MSE of SM⁺: vanishes with the kernel, grows with the lengths.

        exp(‖x + y‖²) SM(x, y)² (1 − exp(−‖x + y‖²)) / m

    Source: Choromanski et al. 2021, Lemma 2.
    """
    return softmax_kernel(x, y).square() * square_norm(x + y).expm1() / num_projections


def mse_hyperbolic(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], num_projections: int
) -> Float[Tensor, "*batch"]:
    """MSE of SM^hyp+ with m projections, hence 2m features: below that of SM⁺ with 2m projections.

        (1 − exp(−‖x + y‖²)) / 2 · MSE(SM⁺ with m projections)

    Source: Choromanski et al. 2021, Lemma 2.
    """
    return -(-square_norm(x + y)).expm1() / 2 * mse_positive(x, y, num_projections)


def mse_regularized(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], num_projections: int
) -> Float[Tensor, "*batch"]:
    """MSE of SMREG⁺ as an estimator of SMREG: positive features, ω on the sphere of radius √dim.

        SM(x, y)² (exp(‖z‖²) r(4‖z‖²) − r(‖z‖²)²) / m,    z = x + y,    r = `regularized_ratio`

    because E exp(ω·z)² = E exp(ω·2z) = exp(‖2z‖²/2) r(‖2z‖²).
    """
    square_norms, dim = square_norm(x + y), x.shape[-1]
    second_moment = square_norms.exp() * regularized_ratio(4 * square_norms, dim)
    variance = second_moment - regularized_ratio(square_norms, dim).square()
    return softmax_kernel(x, y).square() * variance / num_projections


def mse_optimal_positive(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"],
    num_projections: int,
    parameter: float,
) -> Float[Tensor, "*batch"]:
    """MSE of optimal positive features (OPRF) with parameter A; A = 0 is SM⁺.

        f(ω, x) = (1 − 4A)^(dim/4) exp(A‖ω‖² + √(1 − 4A) ω·x − ‖x‖²/2),    ω ~ N(0, I)

        SM(x, y)² ((1 − 4A)^dim (1 − 8A)^(−dim/2) exp(‖x + y‖² / (1 − 8A)) − 1) / m

    f is unbiased for A < 1/4; its variance is finite for A < 1/8 only.

    Raises ValueError for A ≥ 1/8.
    Source: Likhosherstov et al. 2022, "Chefs' Random Tables".
    """
    if not parameter < 1 / 8:
        raise ValueError(
            f"parameter must be below 1/8, where the variance is finite, got {parameter}. "
            "optimal_positive_parameter(...) gives the best one."
        )
    log_constant = x.shape[-1] * (math.log1p(-4 * parameter) - math.log1p(-8 * parameter) / 2)
    relative = (log_constant + square_norm(x + y) / (1 - 8 * parameter)).expm1()
    return softmax_kernel(x, y).square() * relative / num_projections


def optimal_positive_parameter(mean_square_norm: float, dim: int) -> float:
    """The A of OPRF with the smallest variance at ‖x + y‖² = `mean_square_norm`; 0 or below.

        A = (1 − 1/ρ)/8,    ρ = (√((2φ + dim)² + 8 dim φ) − 2φ − dim) / (4φ),    φ = ‖x + y‖²

    For many pairs give the mean of ‖q + k‖²: it minimizes the mean logarithm of the second moment.
    Source: Likhosherstov et al. 2022, "Chefs' Random Tables".
    """
    if not 0 <= mean_square_norm < math.inf:
        raise ValueError(f"mean_square_norm must be finite and at least 0, got {mean_square_norm}.")
    base = 2 * mean_square_norm + dim
    # The same ρ with the root in the denominator: nothing cancels, and φ = 0 gives 1.
    rho = 2 * dim / (math.sqrt(base**2 + 8 * dim * mean_square_norm) + base)
    return (1 - 1 / rho) / 8
