"""How much orthogonal rows of ω lower the error of positive features (Theorems 2 and 6)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from performers.checks import check_choice
from performers.theory.poisson import poisson_mean
from performers.theory.regularized_kernel import regularized_ratio, regularized_softmax_kernel
from performers.theory.vectors import softmax_kernel, square_norm

__all__ = [
    "orthogonality_gap",
    "orthogonality_gap_bound",
    "orthogonality_gap_bound_beautiful",
]

KERNELS = {"gaussian": softmax_kernel, "sphere": regularized_softmax_kernel}


def orthogonality_gap(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"],
    num_projections: int,
    distribution: str = "gaussian",
) -> Float[Tensor, "*batch"]:
    """MSE(SM⁺) − MSE(SM^ort+), exactly: what blocks of orthogonal rows gain, at any m.

        pairs/m² · SM(x, y)² · E[1 − ρ(N)],    N ~ Poisson(‖x + y‖²),
        ρ(n) = Π_{i<n} (dim + i)/(dim + 2i)

    with `pairs` the ordered pairs of rows in one block, m(m−1) for m ≤ dim. With z = x + y, two
    orthogonal rows of independent chi lengths have a sum of uniform direction and of squared length
    chi² with 2·dim degrees of freedom, so E exp((ω₁ + ω₂)·z) = ₁F₁(dim; dim/2; ‖z‖²/2), against
    exp(‖z‖²) for independent rows. On the sphere the sum has length √(2·dim), and the covariance
    of two features is SM² (r(2‖z‖²) − r(‖z‖²)²) with r = `regularized_ratio`.

    Sharpens Theorem 2, `orthogonality_gap_bound`. Starts from Eq. 74 of Choromanski et al. 2021.
    """
    check_choice("distribution", distribution, KERNELS)
    square_norms, dim = square_norm(x + y), x.shape[-1]
    if distribution == "sphere":
        ratio = regularized_ratio(square_norms, dim)
        anticorrelation = ratio.square() - regularized_ratio(2 * square_norms, dim)
    else:
        anticorrelation = poisson_mean(square_norms, lambda n: 1 - _sum_moments(n, dim))
    blocks, rest = divmod(num_projections, dim)
    # Only rows of the same block are orthogonal to each other; pairs across blocks are independent.
    pairs = blocks * dim * (dim - 1) + rest * (rest - 1)
    return softmax_kernel(x, y).square() * anticorrelation * pairs / num_projections**2


def orthogonality_gap_bound(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"],
    num_projections: int,
    distribution: str = "gaussian",
) -> Float[Tensor, "*batch"]:
    """Theorem 2: MSE(SM⁺) − MSE(SM^ort+) is at least this, for m ≤ dim.

        2(m − 1) / (m (dim + 2)) · (SM(x, y) − exp(−(‖x‖² + ‖y‖²)/2))²

    `distribution="sphere"`: the same with SMREG in place of SM.
    Raises ValueError for m > dim.  Source: Choromanski et al. 2021, Theorem 2 (Eq. 10).
    """
    check_choice("distribution", distribution, KERNELS)
    at_zero = (-(square_norm(x) + square_norm(y)) / 2).exp()
    kernel = KERNELS[distribution](x, y)
    return orthogonality_gap_bound_beautiful(kernel, at_zero, num_projections, x.shape[-1])


def orthogonality_gap_bound_beautiful(
    value: Float[Tensor, "*batch"],
    value_at_zero: Float[Tensor, "*batch"],
    num_projections: int,
    dim: int,
) -> Float[Tensor, "*batch"]:
    """Theorem 6: the gap for any F(z) = E g(ω·z), g entire with coefficients a_k ≥ 0 ("beautiful").

        (1 − 1/m) · 2/(dim + 2) · (F(z) − a₀)²

    `value`: F(z). `value_at_zero`: a₀ = g(0) = F(0).
    Raises ValueError for m > dim.  Source: Choromanski et al. 2021, Theorem 6 (Eq. 42).
    """
    if not 1 <= num_projections <= dim:
        raise ValueError(
            f"the bound holds for 1 ≤ num_projections ≤ dim, got {num_projections} with dim {dim}. "
            "orthogonality_gap(...) is exact for any number."
        )
    share = 1 - 1 / num_projections
    return share * 2 / (dim + 2) * (value - value_at_zero).square()


def _sum_moments(n: Tensor, dim: int) -> Tensor:
    """ρ(n) for n = 0, 1, 2, …"""
    # ρ(n)/ρ(n − 1) = (dim + n − 1)/(dim + 2(n − 1)): a running product, summed as logarithms.
    before = (n - 1).clamp(min=0)
    return torch.log1p(before / (dim + before)).cumsum(dim=0).neg().exp()
