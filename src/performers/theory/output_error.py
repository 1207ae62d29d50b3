"""The error of the output of attention that errors of the kernel cause, to first order in 1/m.

With κ̂_j = κ_j (1 + e_j) and p the exact attention weights of a query, out = Σ_j p_j v_j becomes

    out + Σ_j p_j e_j (v_j − out) + O(e²),    m E[e_j e_l] = J_jl − 1,
    J_jl = E[f(ω, q)² f(ω, k_j) f(ω, k_l)] / (κ_j κ_l)        (the joint moment)

The errors of all keys come from the same ω. So the error of the output depends on all of J, not on
the variances on its diagonal alone: an error that all keys share cancels in the normalizer.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "log_joint_moment_hyperbolic",
    "log_joint_moment_optimal",
    "log_joint_moment_positive",
    "log_joint_moment_trigonometric",
    "mse_attention",
]


def log_joint_moment_positive(
    query: Float[Tensor, "*batch dim"], key: Float[Tensor, "*batch keys dim"]
) -> Float[Tensor, "*batch keys keys"]:
    """log J of positive features: (q + k_j)·(q + k_l).

    Its diagonal is ‖q + k‖², the exponent of Lemma 2.
    """
    return _gram(query.unsqueeze(-2) + key)


def log_joint_moment_hyperbolic(
    query: Float[Tensor, "*batch dim"], key: Float[Tensor, "*batch keys dim"]
) -> Float[Tensor, "*batch keys keys"]:
    """log J of hyperbolic features: log cosh((q + k_j)·(q + k_l))."""
    return _log_cosh(_gram(query.unsqueeze(-2) + key))


def log_joint_moment_trigonometric(
    query: Float[Tensor, "*batch dim"], key: Float[Tensor, "*batch keys dim"]
) -> Float[Tensor, "*batch keys keys"]:
    """log J of trigonometric features: log cosh((q − k_j)·(q − k_l))."""
    return _log_cosh(_gram(query.unsqueeze(-2) - key))


def log_joint_moment_optimal(
    query: Float[Tensor, "*batch dim"],
    key: Float[Tensor, "*batch keys dim"],
    parameter: Float[Tensor, "*#batch dim"],
) -> Float[Tensor, "*batch keys keys"]:
    """log J of optimal positive features with a parameter A_i < 1/8 for each coordinate.

        Σ_i log(1 − 4A_i) − log(1 − 8A_i) / 2 + c_i x_i y_i + (c_i − 1)(x_i² + y_i²) / 2,
        x = q + k_j,    y = q + k_l,    c = (1 − 4A) / (1 − 8A)

    With one A for all coordinates and x = y this is the exponent of `mse_optimal_positive`.
    """
    # log1p keeps the digits of small A.
    constant = (-4 * parameter).log1p() - (-8 * parameter).log1p() / 2
    weight = ((1 - 4 * parameter) / (1 - 8 * parameter)).unsqueeze(-2)
    sums = query.unsqueeze(-2) + key
    own = ((weight - 1) * sums.square()).sum(dim=-1) / 2
    # √c on each factor of the product gives Σ_i c_i x_i y_i for all pairs of keys at once.
    both = _gram(sums * weight.sqrt()) + own.unsqueeze(-1) + own.unsqueeze(-2)
    return both + constant.sum(dim=-1)[..., None, None]


def mse_attention(
    log_weights: Float[Tensor, "*batch keys"],
    value: Float[Tensor, "*batch keys value_dim"],
    log_joint_moment: Float[Tensor, "*batch keys keys"],
    num_projections: int,
    is_exact: Bool[Tensor, "*#batch keys"] | None = None,
) -> Float[Tensor, "*batch"]:
    """E‖estimated output − exact output‖² of one query, to first order in 1/m.

        (Σ_jl p_j p_l J_jl (v_j − out)·(v_l − out) − ‖Σ_j p_j (v_j − out)‖²) / m

    over the keys whose scores are estimated. The last term is 0 where that is all of them.
    Projections are independent; orthogonal ones estimate the kernel better still (Theorem 2).

    `log_weights`: log p, −∞ for masked keys. `is_exact`: keys scored exactly (a near field).

    The true error is bounded, because `out` is an average of values, but this formula is not. If it
    gives about the size of the output or more, it only says that m is too small.
    """
    out = (log_weights.exp().unsqueeze(-2) @ value).squeeze(-2)
    deviation = value - out.unsqueeze(-2)
    if is_exact is not None:
        log_weights = log_weights.masked_fill(is_exact, -torch.inf)
    # Summed as logarithms: J may overflow where p_j p_l is tiny, and their product does not.
    pairs = log_joint_moment + log_weights.unsqueeze(-1) + log_weights.unsqueeze(-2)
    second = (pairs.exp() * _gram(deviation)).sum(dim=(-2, -1))
    shared = (log_weights.exp().unsqueeze(-2) @ deviation).squeeze(-2)
    # A variance is never below 0, except by rounding.
    return (second - shared.square().sum(dim=-1)).clamp(min=0) / num_projections


def _gram(x: Float[Tensor, "*batch keys dim"]) -> Float[Tensor, "*batch keys keys"]:
    return x @ x.mT


def _log_cosh(x: Tensor) -> Tensor:
    # log cosh x, without forming cosh x, which overflows.
    return x.abs() + (-2 * x.abs()).exp().log1p() - math.log(2)
