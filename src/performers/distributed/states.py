"""States of several ranks as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from performers.distributed.collectives import on_all_ranks, over_ranks, summed
from performers.state import LinearState

__all__ = ["merged_where", "total_state"]


def total_state(state: LinearState, group: dist.ProcessGroup) -> LinearState:
    """The state of the keys of all ranks: the largest frame, then sums of sums.

    Cost: num_features · (value_dim + 2) numbers per head are exchanged.
    """
    state = state.rescaled(over_ranks(state.log_scale, group, dist.ReduceOp.MAX))
    sums = summed(torch.cat([state.values, state.normalizer.unsqueeze(-1)], dim=-1), group)
    return replace(state, values=sums[..., :-1], normalizer=sums[..., -1])


def merged_where(
    state: LinearState, is_counted: Sequence[bool], group: dist.ProcessGroup
) -> LinearState:
    """The state of the keys of some ranks; others leave no trace, not even of rounding or of NaN.

    All gathered states stay in the graph, with gradients of 0 where they are not counted: a rank
    that left them out would let the others wait for it in the backward pass.

    Cost: num_features · (value_dim + 2) numbers per head and rank are exchanged.
    """
    parts = [state.log_scale.unsqueeze(-1), state.normalizer.unsqueeze(-1), state.values]
    gathered = on_all_ranks(torch.cat(parts, dim=-1), group)
    log_scales, normalizers, values = gathered.split([1, 1, state.values.shape[-1]], dim=-1)

    def of_rank(rank: int) -> LinearState:
        return replace(
            state,
            log_scale=log_scales[rank].detach().squeeze(-1),
            normalizer=normalizers[rank].squeeze(-1),
            values=values[rank],
        )

    counted = [of_rank(rank) for rank, counts in enumerate(is_counted) if counts]
    if not counted:
        everywhere = torch.ones(len(state.values), 1, 1, dtype=torch.bool, device=values.device)
        return of_rank(0).emptied(everywhere)
    return functools.reduce(LinearState.merge, counted)
