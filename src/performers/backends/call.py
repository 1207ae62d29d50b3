"""What every backend is told of a call of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.state import LinearState, NearField
from performers.typing import FeatureMap

__all__ = ["Backend", "Call"]


@dataclass(frozen=True)
class Call:
    """What stays the same over one call of attention, whatever its sequences and tiles.

    `has_state`: a state comes in, or is wanted. `dtype`: of sums and states. `far_limit`: beside a
    near field, what far keys weigh at most together, as a multiple of what is near; None: no limit.
    """

    phi: FeatureMap
    scale: float
    is_causal: bool
    normalize: bool
    near: NearField | None
    has_state: bool
    dtype: torch.dtype
    far_limit: float | None = None

    @property
    def root(self) -> float:
        """√scale, the factor of queries and of keys."""
        return math.sqrt(self.scale)

    def scaled(self, x: Tensor) -> Tensor:
        """Queries or keys as φ takes them."""
        return x.to(self.dtype) * self.root


class Backend(NamedTuple):
    """One way to run a call.

    `attend` takes (call, query, key, value, key_mask, state) to the output, [batch, key_heads,
    group, query_length, value_dim], and to the state after the keys if the call has one. Its
    queries are [batch, key_heads, group, query_length, dim], its state is empty where none came in.
    `refusal` takes (call, query, key, value), as attention got them, to the reason why `attend`
    cannot serve the call, None if it can.
    """

    attend: Callable[
        [
            Call,
            Float[Tensor, "batch key_heads group query_length dim"],
            Float[Tensor, "batch key_heads key_length dim"],
            Float[Tensor, "batch key_heads key_length value_dim"],
            Bool[Tensor, "batch key_length"] | None,
            LinearState,
        ],
        tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState],
    ]
    refusal: Callable[[Call, Tensor, Tensor, Tensor], str | None]
