"""How likely an estimate is to be far too large (Theorems 3 and 5)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from performers.theory.vectors import square_norm

__all__ = [
    "regularized_moment_generating_function",
    "regularized_tail_bound_iid",
    "regularized_tail_bound_orthogonal",
    "tail_bound_iid",
    "tail_bound_orthogonal",
]


def tail_bound_iid(
    generating_function: Float[Tensor, "*batch"],
    threshold: float,
    theta: float,
    num_projections: int,
) -> Float[Tensor, "*batch"]:
    """Lemma 4: an upper bound on the probability that a mean of m independent features exceeds
    `threshold`.

        exp(−θ m a) M(θ)^m,    M(θ) = E exp(θ X) of one feature X,    any θ > 0

    Source: Choromanski et al. 2021, Lemma 4 (Eq. 40).
    """
    return (num_projections * (generating_function.log() - theta * threshold)).exp()


def tail_bound_orthogonal(
    generating_function: Float[Tensor, "*batch"],
    threshold: float,
    theta: float,
    num_projections: int,
    slope: Float[Tensor, "*batch"],
    mean_square_projection: Float[Tensor, "*batch"],
    dim: int,
) -> Float[Tensor, "*batch"]:
    """Theorem 5: the same bound for orthogonal rows, which is strictly smaller at every dim.

        exp(−θ m a) (M(θ)^m − θ⁴ m (m − 1) / (4 (dim + 2)) · a₁⁴ (E(ω·z)²)²)

    for a feature X = g(ω·z), g(u) = Σ_k a_k u^k with a_k ≥ 0, and m ≤ dim. `slope`: a₁.
    `mean_square_projection`: E(ω·z)², which is ‖z‖² E‖ω‖²/dim.

    The paper prints a₀^(m−2) a₁² in place of a₁⁴. Its proof gives a₁⁴: of the term X₁² X₂² of the
    series, nothing comes from the other m − 2 features. For features that are scaled by a factor
    below 1 the printed bound follows from this one if m ≥ 4; for m = 2 it can fall below 0.

    Raises ValueError for m > dim.  Source: Choromanski et al. 2021, Theorem 5 and its proof.
    """
    if not 1 <= num_projections <= dim:
        raise ValueError(
            f"the bound holds for 1 ≤ num_projections ≤ dim, got {num_projections} with dim {dim}."
        )
    pairs = num_projections * (num_projections - 1)
    gain = theta**4 * pairs / (4 * (dim + 2)) * slope**4 * mean_square_projection.square()
    independent = tail_bound_iid(generating_function, threshold, theta, num_projections)
    return independent - math.exp(-theta * num_projections * threshold) * gain


def regularized_tail_bound_iid(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"],
    threshold: float,
    theta: float,
    num_projections: int,
) -> Float[Tensor, "*batch"]:
    """Theorem 3, first part: P[SMREG⁺ > threshold] is at most this, for any θ > 0.

    Useful for thresholds above SMREG(x, y). The caller has to find the best θ.
    Raises ValueError for dim 1.  Source: Choromanski et al. 2021, Theorem 3.
    """
    generating_function = regularized_moment_generating_function(x, y, theta)
    return tail_bound_iid(generating_function, threshold, theta, num_projections)


def regularized_tail_bound_orthogonal(
    x: Float[Tensor, "*batch dim"],
    y: Float[Tensor, "*batch dim"],
    threshold: float,
    theta: float,
    num_projections: int,
) -> Float[Tensor, "*batch"]:
    """Theorem 3, second part: P[SMREG^ort+ > threshold] is at most this, for any θ > 0 and m ≤ dim.

        exp(−θ m a) (M(θ)^m − θ⁴ m (m − 1) / (4 (dim + 2)) · exp(−2(‖x‖² + ‖y‖²)) ‖x + y‖⁴)

    `tail_bound_orthogonal` says why the exponent is 2 where the paper prints m/2.
    Raises ValueError for dim 1 or m > dim.  Source: Choromanski et al. 2021, Theorem 3.
    """
    return tail_bound_orthogonal(
        regularized_moment_generating_function(x, y, theta),
        threshold,
        theta,
        num_projections,
        slope=(-(square_norm(x) + square_norm(y)) / 2).exp(),
        mean_square_projection=square_norm(x + y),
        dim=x.shape[-1],
    )


def regularized_moment_generating_function(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"], theta: float
) -> Float[Tensor, "*batch"]:
    """M(θ) = E exp(θ X) of one SMREG⁺ feature X = exp(−(‖x‖² + ‖y‖²)/2 + ω·(x + y)).

    ω·(x + y) is √dim ‖x + y‖ cos α with α of density sin^(dim−2) α on [0, π]: one integral, by the
    midpoint rule. For Gaussian ω, X is log-normal and M(θ) infinite: hence the theorem's SMREG.

    Raises ValueError for dim 1.
    """
    dim = x.shape[-1]
    if dim < 2:
        raise ValueError("the angle of a row with x + y needs dim ≥ 2, got vectors of dim 1.")
    nodes = 2048
    angles = (torch.arange(nodes, dtype=x.dtype, device=x.device) + 0.5) * math.pi / nodes
    density = angles.sin().pow(dim - 2)
    length = (dim * square_norm(x + y)).sqrt().unsqueeze(-1)
    log_scale = -(square_norm(x) + square_norm(y)).unsqueeze(-1) / 2
    feature = (log_scale + length * angles.cos()).exp()
    # Dividing by the sum of the density normalizes it, so its constant is not needed.
    return ((theta * feature).exp() * density).sum(dim=-1) / density.sum()
