"""SMREG, the softmax kernel with every ω of length √dim, compared with the softmax kernel (Theorem
1).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from performers.theory.poisson import poisson_mean
from performers.theory.vectors import softmax_kernel, square_norm

__all__ = [
    "regularized_ratio",
    "regularized_ratio_asymptote",
    "regularized_ratio_bound",
    "regularized_softmax_kernel",
]


def regularized_softmax_kernel(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """SMREG(x, y) = exp(−(‖x‖² + ‖y‖²)/2) · E exp(ω·(x + y)), ω uniform on the √dim-sphere.

    Source: Choromanski et al. 2021, Section 2.3; the series is Eq. 29.
    """
    return softmax_kernel(x, y) * regularized_ratio(square_norm(x + y), x.shape[-1])


def regularized_ratio(square_norms: Float[Tensor, "*batch"], dim: int) -> Float[Tensor, "*batch"]:
    """SMREG(x, y) / SM(x, y), which depends on ‖x + y‖² and dim alone; never above 1.

        Σ_k e^(−w) w^k / k! · f(k),    w = ‖x + y‖²/2,    f(k) = dim^k / (dim (dim+2) … (dim+2k−2))

    For a given w it is 1 − w²/dim + O(dim⁻²).
    Source: Choromanski et al. 2021, Appendix F.3 (Eq. 30).
    """
    return poisson_mean(square_norms / 2, lambda k: _sphere_moments(k, dim))


def regularized_ratio_bound(
    square_norms: Float[Tensor, "*batch"], dim: int
) -> Float[Tensor, "*batch"]:
    """The lower bound of SMREG/SM on which Theorem 1 rests, at any dim.

        max over l of f(l) · P[N ≤ l],    N ~ Poisson(‖x + y‖²/2),    f as in `regularized_ratio`

    because f falls with k. Theorem 1 takes l = dim^(1/3) and lets dim grow.
    Source: Choromanski et al. 2021, Appendix F.3 (Eq. 32).
    """
    rate = (square_norms.to(torch.float64) / 2).unsqueeze(-1)
    largest = float(rate.max())
    level = torch.arange(largest + 10 * largest**0.5 + 60, dtype=torch.float64, device=rate.device)
    # P[N ≤ l] of a Poisson variable is the regularized upper incomplete gamma function.
    probability = torch.special.gammaincc(level + 1, rate)
    return (_sphere_moments(level, dim) * probability).amax(dim=-1).to(square_norms.dtype)


def regularized_ratio_asymptote(dim: int) -> float:
    """Theorem 1: 1 − 2/dim^(1/3), under which no entry's SMREG/SM falls, up to o(dim^(−1/3)).

    The theorem bounds the entries of the attention matrix by a constant while dim grows. At a
    given dim, vectors can be long enough to fall below; `regularized_ratio_bound` holds for all.
    """
    return 1 - 2 / dim ** (1 / 3)


def _sphere_moments(k: Tensor, dim: int) -> Tensor:
    """f(k) for k = 0, 1, 2, …: E (ω·e)^2k on the sphere of radius √dim over that of N(0, I)."""
    return torch.log1p(2 * (k - 1).clamp(min=0) / dim).cumsum(dim=0).neg().exp()
