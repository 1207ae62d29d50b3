"""What attention layers of a model were called with, to be measured."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["Captured"]


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
