"""What is asked of a library whose checkpoints can be imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from performers.nn.dialect import Dialect

__all__ = ["Layout", "Library", "Renamed"]

# Where a layer of ours has ω.
OMEGA = "mechanism.feature_map.omega"


@dataclass
class Renamed:
    """The tensors of a checkpoint by the names of `PerformerModel`, and what has no such name.

    Of an attention layer alone the names are those of the layer. `num_heads`: where shapes say it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    num_heads: int | None = None

    def is_whole(self) -> bool:
        """Whether every name has a counterpart, and there is an attention layer."""
        has_attention = any(name.endswith("q_proj.weight") for name in self.tensors)
        return has_attention and not self.unknown


class Layout(NamedTuple):
    """What a dialect may depend on. `num_columns`: m, or 1 without ω."""

    features: str
    is_causal: bool
    head_dim: int
    num_columns: int


class Library(NamedTuple):
    """One row of `LIBRARIES`.

    `rename`: from the checkpoint's names to ours; raises ValueError for what has no counterpart.
    `features`: the words for what it can compute, see `PerformerConfig.attention`; "exact" too.
    `default`: the one that its constructors choose, with ω and without.
    `dialect`: what it computes in the place of our formulas.
    `fields`: of `PerformerConfig`, which hold for all its models.
    `ties_head`: a language model without a weight for its head has the embedding's.
    """

    rename: Callable[[Mapping[str, Tensor]], Renamed]
    features: tuple[str, ...]
    default: Callable[[bool], str]
    dialect: Callable[[Layout], Dialect | None]
    fields: Mapping[str, Any]
    ties_head: bool = False
