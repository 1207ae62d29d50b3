"""A near field over ranks: what a piece needs of the others, as a state and as tokens around it.

Blocks are those of the whole sequence and do not begin where pieces do. Of a piece that has the
positions from `start` to `stop`, these parts matter:

     far keys  │ two blocks, the second  │  piece  │ two blocks, the first  │  far keys
               │ of them just begun      │         │ of them just begun     │
              cut                      start     stop                     reach

What lies before it becomes a state, as if a sequence were continued. In bidirectional attention the
tokens after it follow the piece's own, and their outputs are dropped.

Each rank offers its first and its last tokens, and the sums over its keys that are far of all
pieces after it, or before it. Who takes a token need not be a neighbor, because pieces may be
shorter than a block. Keys that are near of one piece and far of the next are among these tokens,
and are summed by each rank to which they are far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends import BACKENDS, Call, choose_backend
from performers.distributed.collectives import on_all_ranks
from performers.distributed.pieces import Pieces, taken
from performers.distributed.states import merged_where
from performers.functional import favor_attention
from performers.functional.autocast import without_autocast
from performers.state import LinearState, NearField, NearKeys

__all__ = ["attend_in_context"]


def attend_in_context(
    call: Call,
    backend: str | None,
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    is_real: Bool[Tensor, "batch length"],
    group: dist.ProcessGroup,
) -> Float[Tensor, "batch heads length value_dim"]:
    """Attention with a near field for this rank's piece, of which some tokens may be padding."""
    absent = ~is_real[:, None, :, None]  # which may be NaN, and would be multiplied by 0
    key, value = key.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
    context = _Context.of(call, backend, key, value, is_real, group)
    state = context.before()
    if call.is_causal:
        return favor_attention(
            query,
            key,
            value,
            call.phi,
            is_causal=True,
            key_padding_mask=is_real,
            scale=call.scale,
            normalize=call.normalize,
            enable_gqa=True,
            window_size=context.near.window_size,
            num_sinks=context.near.num_sinks,
            far=context.near.far,
            far_limit=call.far_limit,
            initial_state=state,
            backend=backend,
        )
    sums, after = context.after()
    state = replace(replace(state, near=None).merge(sums), near=state.near)
    key, value = torch.cat([key, after.key], dim=2), torch.cat([value, after.value], dim=2)
    is_real = torch.cat([is_real, after.is_there], dim=1)
    rows = F.pad(query, (0, 0, 0, after.key.shape[2]))
    # Not through `favor_attention`, which refuses to continue a bidirectional window: only here is
    # it known that the sums are of keys on both sides.
    chosen = choose_backend(backend, call, rows, key, value)
    with without_autocast(query):
        grouped = rows.unflatten(1, (key.shape[1], -1))
        out, _ = BACKENDS[chosen].attend(call, grouped, key, value, is_real, state)
    return out.flatten(1, 2)[:, :, : query.shape[2]].to(query.dtype)


class _Placed(NamedTuple):
    """Tokens at successive positions, and which of them there are."""

    key: Float[Tensor, "batch key_heads places dim"]
    value: Float[Tensor, "batch key_heads places value_dim"]
    is_there: Bool[Tensor, "batch places"]


@dataclass(frozen=True)
class _Tokens:
    """Keys and values of tokens of all ranks, [ranks, batch, key_heads, places, ·], and where each
    is in the whole sequence.
    """

    key: Float[Tensor, "ranks batch key_heads places dim"]
    value: Float[Tensor, "ranks batch key_heads places value_dim"]
    position: Int[Tensor, "ranks batch places"]
    is_there: Bool[Tensor, "ranks batch places"]

    def side_by_side(
        self,
        chosen: Bool[
            Tensor,
            (
                ranks  # batch #places
            ),
        ],
    ) -> _Placed:
        """All of them as one sequence, in which those count that are chosen."""
        key, value = (x.movedim(0, 2).flatten(2, 3) for x in (self.key, self.value))
        return _Placed(key, value, (chosen & self.is_there).movedim(0, 1).flatten(1))

    def placed(
        self,
        chosen: Bool[
            Tensor,
            (
                ranks  # batch #places
            ),
        ],
        first: Int[Tensor, "batch 1"],
        number: int,
    ) -> _Placed:
        """Those that are chosen, at the positions first, first + 1, …; 0 where there is none."""
        tokens = self.side_by_side(chosen)
        place = self.position.movedim(0, 1).flatten(1) - first
        is_taken = tokens.is_there & (place >= 0) & (place < number)
        place = place.where(is_taken, number)  # a place too many, cut off again
        key, value = (
            x.new_zeros(*x.shape[:2], number + 1, x.shape[3]).scatter(
                2, place[:, None, :, None].expand_as(x), x
            )[:, :, :number]
            for x in (tokens.key, tokens.value)
        )
        is_there = torch.zeros_like(place[:, :1]).bool().repeat(1, number + 1)
        return _Placed(key, value, is_there.scatter(1, place, True)[:, :number])


@dataclass(frozen=True)
class _Context:
    """A rank's piece, and the first and last tokens of all ranks."""

    call: Call
    backend: str | None
    near: NearField
    key: Float[Tensor, "batch key_heads length dim"]
    value: Float[Tensor, "batch key_heads length value_dim"]
    pieces: Pieces
    first: _Tokens
    last: _Tokens
    group: dist.ProcessGroup

    @classmethod
    def of(
        cls,
        call: Call,
        backend: str | None,
        key: Tensor,
        value: Tensor,
        is_real: Tensor,
        group: dist.ProcessGroup,
    ) -> _Context:
        """Exchange the tokens."""
        near = call.near
        assert near is not None, "called for a near field only"
        pieces = Pieces.of(is_real, group)
        count = pieces.counts[:, :, None]  # [ranks, batch, 1]
        of_two_blocks = torch.arange(2 * near.window_size, device=key.device)
        of_first = torch.arange(max(len(of_two_blocks), near.num_sinks), device=key.device)
        # The numbers of the tokens in their pieces.
        begin = of_first.expand(*count.shape[:2], -1)
        number = torch.cat([begin, count - len(of_two_blocks) + of_two_blocks], dim=-1)
        is_there = (number >= 0) & (number < count)
        index = pieces.real_at(number[pieces.rank])
        own = taken(torch.cat([key, value], dim=-1), index, is_there[pieces.rank])
        rows = on_all_ranks(own, group).split([key.shape[-1], value.shape[-1]], dim=-1)
        position = number + pieces.starts[:, :, None]
        sizes = [len(of_first), len(of_two_blocks)]
        parts = [x.split(sizes, dim=3) for x in rows]
        parts += [x.split(sizes, dim=2) for x in (position, is_there)]
        first, last = (_Tokens(*part) for part in zip(*parts, strict=True))
        return cls(call, backend, near, key, value, pieces, first, last, group)

    def before(self) -> LinearState:
        """The state of all that lies before this rank's piece."""
        near, size, pieces = self.near, self.near.window_size, self.pieces
        start = pieces.starts[pieces.rank]
        cut = self._cut(start).unsqueeze(1)
        cuts = self._cut(pieces.stops).unsqueeze(2)
        is_earlier = self._ranks() < pieces.rank
        # Near of the piece that comes next after theirs, far of this one.
        is_far = is_earlier & (self.last.position >= cuts) & (self.last.position < cut)
        own_far = pieces.positions() < cuts[pieces.rank]
        state = self._sums(own_far, is_earlier, self.last, is_far)
        two_blocks = self.last.placed(is_earlier, cut, 2 * size)
        sinks = self.first.placed(is_earlier, torch.zeros_like(cut), near.num_sinks)
        keys = NearKeys.empty(self.key, self.value, near, self.call.dtype)
        keys = replace(
            keys,
            key=two_blocks.key,
            value=two_blocks.value,
            sink_key=sinks.key,
            sink_value=sinks.value,
            count=start,
        )
        return replace(state, near=keys)

    def after(self) -> tuple[LinearState, _Placed]:
        """The sums of what is far after this rank's piece, and the tokens before that."""
        near, pieces = self.near, self.pieces
        stop = pieces.stops[pieces.rank]
        reach = self._reach(stop).unsqueeze(1)
        reaches = self._reach(pieces.starts).unsqueeze(2)
        is_later = self._ranks() > pieces.rank
        is_far = is_later & (self.first.position < reaches) & (self.first.position >= reach)
        own_far = pieces.positions() >= reaches[pieces.rank]
        sums = self._sums(own_far, is_later, self.first, is_far)
        # Sinks are looked for among the tokens at hand, so these reach as far as sinks do.
        is_at_hand = is_later & (self.first.position < reach.clamp(min=near.num_sinks))
        number = max(2 * near.window_size, near.num_sinks)
        return sums, self.first.placed(is_at_hand, stop.unsqueeze(1), number)

    def _sums(
        self,
        own_far: Bool[Tensor, "batch length"],
        is_counted: Bool[Tensor, "ranks 1 1"],
        tokens: _Tokens,
        far_tokens: Bool[
            Tensor,
            (
                ranks  # batch #places
            ),
        ],
    ) -> LinearState:
        """Sums over the far keys of the counted ranks: what each of them offers of its own, and
        single tokens. Sinks are exact everywhere, so they are left out.
        """
        batch, heads, _, value_dim = self.value.shape
        if not self.near.far:
            device = self.value.device
            return LinearState.empty(
                batch, heads, 0, value_dim, device=device, dtype=self.call.dtype
            )
        num_sinks = self.near.num_sinks
        own_far = own_far & self.pieces.is_real & (self.pieces.positions() >= num_sinks)
        own = self._state_of(_Placed(self.key, self.value, own_far))
        others = merged_where(own, is_counted.flatten().tolist(), self.group)
        single = tokens.side_by_side(far_tokens & (tokens.position >= num_sinks))
        return others.merge(self._state_of(single))

    def _state_of(self, tokens: _Placed) -> LinearState:
        """Sums over the features of tokens that are there."""
        _, state = favor_attention(
            tokens.key[:, :, :0],
            tokens.key,
            tokens.value,
            self.call.phi,
            key_padding_mask=tokens.is_there,
            scale=self.call.scale,
            return_state=True,
            backend=self.backend,
        )
        return state

    def _ranks(self) -> Int[Tensor, "ranks 1 1"]:
        device = self.pieces.counts.device
        return torch.arange(len(self.pieces.counts), device=device)[:, None, None]

    def _cut(self, position: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Keys before it are far of all tokens from `position` on."""
        return (position // self.near.window_size - 1) * self.near.window_size

    def _reach(self, position: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Keys from it on are far of all tokens before `position`."""
        return ((position - 1) // self.near.window_size + 2) * self.near.window_size
