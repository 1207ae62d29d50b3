"""Averages over a Poisson variable, as which the power series of exp can be written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def poisson_mean(
    rate: Float[Tensor, "*batch"], values: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch"]:
    """Σ_k e^(−rate) rate^k / k! · values(k): E values(N) for N ~ Poisson(rate).

    `values` maps (0, 1, 2, …) to numbers of one sign, bounded by 1. Terms beyond
    rate + 10 √rate + 60 are left out; they hold less than 1e-15 of the probability.

    Cost: O(batch · largest rate).
    """
    largest = float(rate.max())
    count = torch.arange(largest + 10 * largest**0.5 + 60, dtype=torch.float64, device=rate.device)
    rate64 = rate.to(torch.float64).unsqueeze(-1)
    # As a logarithm, because rate^k and k! overflow; xlogy makes 0 · log 0 equal to 0.
    log_probability = torch.xlogy(count, rate64) - rate64 - torch.lgamma(count + 1)
    return (log_probability.exp() * values(count)).sum(dim=-1).to(rate.dtype)
