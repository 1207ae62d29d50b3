"""Where the tokens of a piece are in the whole sequence, counted in real tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.distributed.collectives import on_all_ranks, rank_in

__all__ = ["Pieces", "taken"]


@dataclass(frozen=True)
class Pieces:
    """Which tokens of a rank's piece are real, and how many are real on every rank.

    `is_real` may leave out more than padding: what is counted is the caller's choice.
    """

    is_real: Bool[Tensor, "batch length"]
    counts: Int[Tensor, "ranks batch"]
    rank: int

    @classmethod
    def of(cls, is_real: Bool[Tensor, "batch length"], group: dist.ProcessGroup) -> Pieces:
        """Cost: one number per sequence and rank is exchanged."""
        return cls(is_real, on_all_ranks(is_real.sum(dim=1), group), rank_in(group))

    @property
    def starts(self) -> Int[Tensor, "ranks batch"]:
        """The position of the first real token of each piece."""
        return self.stops - self.counts

    @property
    def stops(self) -> Int[Tensor, "ranks batch"]:
        """The position after the last real token of each piece."""
        return self.counts.cumsum(dim=0)

    def positions(self) -> Int[Tensor, "batch length"]:
        """The number of real tokens before each token, in the whole sequence."""
        real = self.is_real.long()
        return self.starts[self.rank].unsqueeze(1) + real.cumsum(dim=1) - real

    def real_at(self, index: Int[Tensor, "batch places"]) -> Int[Tensor, "batch places"]:
        """Where in the piece its real tokens of these numbers are; anywhere if there are none."""
        order = (~self.is_real).byte().argsort(dim=1, stable=True)
        return order.gather(1, index.clamp(0, order.shape[1] - 1))


def taken(
    x: Float[Tensor, "batch heads length dim"],
    index: Int[Tensor, "batch places"],
    is_there: Bool[Tensor, "batch places"],
) -> Float[Tensor, "batch heads places dim"]:
    """The rows at these places, other ones in each sequence; 0 where nothing is."""
    rows = x.take_along_dim(index[:, None, :, None], dim=2)
    return rows.masked_fill(~is_there[:, None, :, None], 0.0)
