"""What the other formulas use: squared lengths and the softmax kernel."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def square_norm(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """‖x‖²."""
    return x.square().sum(dim=-1)


def softmax_kernel(
    x: Float[Tensor, "*batch dim"], y: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """SM(x, y) = exp(x·y), Eq. 6 of Choromanski et al. 2021."""
    return (x * y).sum(dim=-1).exp()
