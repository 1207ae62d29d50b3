"""Features that learn from a call, where no rank has the whole call."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from performers.distributed.collectives import over_ranks
from performers.distributed.pieces import Pieces, taken
from performers.functional.autocast import without_autocast
from performers.functional.moments import SAMPLED_POSITIONS
from performers.nn.sharp import SharpFeatures
from performers.typing import FeatureMap

__all__ = ["fitted_to_all"]


@torch.no_grad()
def fitted_to_all(
    phi: FeatureMap,
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    is_estimated: Bool[Tensor, "batch length"],
    group: dist.ProcessGroup,
    *,
    scale: float,
    length: int,
) -> FeatureMap:
    """The map that one process would fit to the whole sequence, which is `length` long.

    Sharp features learn from at most 997 positions of a sequence. Those that one process would
    take are collected from the ranks that have them, so each rank learns from the same numbers.
    Other maps come back as they are.

    Cost: 997 · (heads + key_heads) · dim numbers per sequence are exchanged, at any length.
    """
    if not (isinstance(phi, SharpFeatures) and phi.statistics == "call"):
        return phi
    pieces = Pieces.of(is_estimated, group)
    own, start = pieces.counts[pieces.rank, :, None], pieces.starts[pieces.rank, :, None]
    number = torch.arange(min(SAMPLED_POSITIONS, length), device=query.device)
    shown = pieces.counts.sum(dim=0).unsqueeze(1)
    chosen = shown.clamp(max=len(number))
    # As in `performers.functional.moments.sampled`: the middles of equal parts of what is shown.
    index = (2 * number + 1) * shown // (2 * chosen).clamp(min=1) - start
    is_used = number < chosen
    is_here = is_used & (index >= 0) & (index < own)
    rows = torch.cat([query, key], dim=1)
    rows = taken(rows, pieces.real_at(index), is_here)
    rows = over_ranks(rows, group, dist.ReduceOp.SUM)  # each row is 0 on all ranks but one
    queries, keys = rows.split([query.shape[1], key.shape[1]], dim=1)
    with without_autocast(query):
        return phi.fitted(queries, keys, is_used, scale=scale, is_streaming=False)
