"""What attention layers of a model were called with, to be measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Captured", "relative_errors"]


@dataclass(frozen=True)
class Captured:
    """One call of attention in a model. Sequences are whole, so there is no padding to mask.

    `scale`: None is 1/√dim.
    """

    name: str
    query: Float[Tensor, "batch heads query_length dim"]
    key: Float[Tensor, "batch key_heads key_length dim"]
    value: Float[Tensor, "batch key_heads key_length value_dim"]
    scale: float | None
    is_causal: bool


def relative_errors(
    out: Float[Tensor, "batch heads length value_dim"],
    exact: Float[Tensor, "batch heads length value_dim"],
) -> Float[Tensor, "batch heads"]:
    """‖out − exact‖ / ‖exact‖ of each sequence and head."""
    difference, whole = (x.float().flatten(2).norm(dim=-1) for x in (out - exact, exact))
    return difference / whole.clamp(min=torch.finfo(whole.dtype).tiny)
