"""Slots: the real tokens of a sequence side by side, cut into the blocks of a near field.

Blocks are counted in real tokens, so that padding, wherever it is, changes nothing. Slot 0 is the
first of a block. If a state is continued, the slots begin with the keys that it remembers:

    slots     │ the block before │ the next token's own │ …            a block: window_size slots
               ─── remembered keys ───┃── new tokens ────

They end with the last new token, so that a part of a block costs no more than the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.backends.derivatives import is_traced
from performers.state import NearField, NearKeys

__all__ = ["Slots"]


@dataclass(frozen=True)
class Slots:
    """Queries, keys and values in slots, at the positions `start`, `start` + 1, …

    `count`: real tokens up to the last slot, all earlier ones included. `is_real`: True for slots
    that have a key. `place`: the slot of each new token; `is_token`: True for real tokens, False
    for padding. These are None if every slot has a key, and tokens are slots.
    """

    near: NearField
    query: Float[Tensor, "batch key_heads group slots dim"]
    key: Float[Tensor, "batch key_heads slots dim"]
    value: Float[Tensor, "batch key_heads slots value_dim"]
    start: Int[Tensor, "batch 1"]
    count: Int[Tensor, "batch 1"]
    is_real: Bool[Tensor, "batch slots"] | None = None
    place: Int[Tensor, "batch length"] | None = None
    is_token: Bool[Tensor, "batch length"] | None = None

    @classmethod
    def of(
        cls,
        near: NearField,
        query: Float[Tensor, "batch key_heads group length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        is_token: Bool[Tensor, "batch length"] | None,
        earlier: NearKeys | None,
    ) -> Slots:
        """The slots of new tokens, after those of the keys that a state remembers."""
        batch, length = key.shape[0], key.shape[2]
        zero = torch.zeros(batch, 1, dtype=torch.int64, device=key.device)
        if is_token is None and earlier is None:
            return cls(near, query, key, value, zero, zero + length)
        if is_token is None:
            is_token = torch.ones(batch, length, dtype=torch.bool, device=key.device)
        number = is_token.sum(dim=1, keepdim=True)
        # The number of real tokens before each; −1 for padding in front, which the clamp makes 0.
        rank = is_token.cumsum(dim=1) - 1
        token = torch.arange(length, device=key.device).expand(batch, -1)
        # Real tokens come first, in their order. Not by a stable sort, which ONNX lacks.
        order = torch.where(is_token, rank, number + token - rank - 1)
        real_first = torch.zeros_like(order).scatter(1, order, token)
        rank = rank.clamp(min=0)
        if earlier is None:
            is_real = torch.arange(length, device=key.device) < number
            query, key, value = (_taken(x, real_first) for x in (query, key, value))
            return cls(near, query, key, value, zero, number, is_real, rank, is_token)
        size, before = near.window_size, earlier.count.unsqueeze(1)
        # Slots begin with the block before that of the next token. Below one block that is position
        # −size, and the slots before position 0 are not real.
        start = (before // size - 1) * size
        first = before - start  # the slot of the first new token
        most = 2 * size + length
        is_fixed = is_traced() or batch == 0
        num_slots = most if is_fixed else int((first + number.clamp(min=1)).max())
        slot = torch.arange(num_slots, device=key.device).expand(batch, -1)
        source = real_first.gather(1, (slot - first).clamp(0, length - 1))
        query = _taken(query, source)
        # Places in [remembered keys, new keys]: the former for the first slots, the latter after
        # them.
        source = torch.where(slot < first, slot, 2 * size + source)
        key = _taken(torch.cat([earlier.key.to(key.dtype), key], dim=2), source)
        value = _taken(torch.cat([earlier.value.to(value.dtype), value], dim=2), source)
        is_real = (slot + start >= 0) & (slot < first + number)
        return cls(near, query, key, value, start, before + number, is_real, first + rank, is_token)

    def positions(self) -> Int[Tensor, "batch slots"]:
        """How many real tokens come before each slot; negative before the first."""
        return self.start + torch.arange(self.key.shape[2], device=self.key.device)

    def estimated(self) -> Bool[Tensor, "batch slots"] | None:
        """The keys that are not exact for every query: real ones other than sinks. None: all."""
        if self.near.num_sinks == 0:
            return self.is_real
        is_later = self.positions() >= self.near.num_sinks
        return is_later if self.is_real is None else is_later & self.is_real

    def sinks(
        self, earlier: NearKeys | None
    ) -> tuple[
        Float[Tensor, "batch key_heads num_sinks dim"],
        Float[Tensor, "batch key_heads num_sinks value_dim"],
        Bool[Tensor, "batch num_sinks"],
    ]:
        """Keys and values of the first tokens, and a mask of those that exist; 0 for the others."""
        position = torch.arange(self.near.num_sinks, device=self.key.device)
        is_there = position < self.count
        key, value = self.at(position)
        if earlier is not None:
            is_earlier = (position < self.start)[:, None, :, None]
            key = torch.where(is_earlier, earlier.sink_key.to(key.dtype), key)
            value = torch.where(is_earlier, earlier.sink_value.to(value.dtype), value)
        return key, value, is_there

    def next_start(self) -> Int[Tensor, "batch 1"]:
        """The position of slot 0 for the tokens to come."""
        return (self.count // self.near.window_size - 1) * self.near.window_size

    def at(
        self, position: Int[Tensor, "*batch places"]
    ) -> tuple[
        Float[Tensor, "batch key_heads places dim"],
        Float[Tensor, "batch key_heads places value_dim"],
    ]:
        """Keys and values at these positions; 0 where there is none, or none in a slot."""
        return self.rows_at(position, self.key), self.rows_at(position, self.value)

    def rows_at(
        self, position: Int[Tensor, "*batch places"], x: Float[Tensor, "batch *heads slots _"]
    ) -> Float[Tensor, "batch *heads places _"]:
        """What each slot has of x, at these positions; 0 where there is none, or none in a slot."""
        if not position.shape[-1]:  # or there would be a gradient as long as x, of nothing
            return x.new_empty(*x.shape[:-2], 0, x.shape[-1])
        slot = position - self.start
        is_here = (slot >= 0) & (position >= 0) & (position < self.count)
        slot = slot.clamp(0, self.key.shape[2] - 1)
        return _taken(x, slot).masked_fill(~is_here[:, None, :, None], 0.0)

    def tokens(
        self, rows: Float[Tensor, "batch key_heads group slots _"]
    ) -> Float[Tensor, "batch key_heads group length _"]:
        """The rows of the new tokens, from rows in slots; padding gets 0."""
        if self.place is None or self.is_token is None:
            return rows
        return _taken(rows, self.place).masked_fill(~self.is_token[:, None, None, :, None], 0.0)


def _taken(
    x: Float[Tensor, "batch *heads length _"], index: Int[Tensor, "batch places"]
) -> Float[Tensor, "batch *heads places _"]:
    """x at the given places along the length, which differ between sequences."""
    row = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    # With the length next to the batch, [row, index] takes other places in every sequence.
    return x.movedim(-2, 1)[row, index].movedim(1, -2)
