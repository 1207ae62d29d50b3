"""Softmax attention in which a block of queries sees a few blocks of keys: the core of sparse ones.

    query blocks    0   1   2   3   4                of block 3
                    │   │   │   ├───┴────┐           keys are gathered: blocks 0, 2, 3, 4
    key blocks      0   1   2   3   4    ▼
                    ■ ─ ─ ─ ■ ─ ■ ─ ■  one softmax over those that the pattern lets it see

A matrix of all pairs, or a mask of all pairs, never exists. What one softmax cannot gather at once
is computed in parts (`Part`), which are then put under one normalizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends.slots import Slots

__all__ = [
    "Part",
    "Sees",
    "attend_to_blocks",
    "combined",
    "is_there",
    "nearest_blocks",
    "part",
    "part_of_scores",
    "real",
    "with_global_rows",
]

# (positions of queries, positions of keys), which broadcast, to whether the first see the second.
Sees = Callable[[Tensor, Tensor], Tensor]


class Part(NamedTuple):
    """A softmax over some of the keys of each row, before it is normalized.

        total  = Σ_j exp(s_j − frame),    values = Σ_j exp(s_j − frame) v_j

    The frame, the largest score of a row, keeps all terms in range and cancels in the end, so it is
    not differentiated. Of a row that sees no key, total and values are 0.
    """

    values: Float[Tensor, "*batch rows value_dim"]
    total: Float[Tensor, "*batch rows 1"]
    frame: Float[Tensor, "*batch rows 1"]

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        """The same with a function applied to each tensor, such as a change of their order."""
        return Part(*map(function, self))

    def average(self) -> Float[Tensor, "*batch rows value_dim"]:
        """The values by the weights of the softmax; 0 for a row that sees no key."""
        return self.values / torch.where(self.total == 0, 1.0, self.total)

    def merge(self, other: Part) -> Part:
        """Both sets of keys under one normalizer."""
        frame = torch.maximum(self.frame, other.frame)
        mine, theirs = (self.frame - frame).exp(), (other.frame - frame).exp()
        return Part(
            mine * self.values + theirs * other.values,
            mine * self.total + theirs * other.total,
            frame,
        )


def part(
    query: Float[Tensor, "*#batch rows dim"],
    key: Float[Tensor, "*#batch columns dim"],
    value: Float[Tensor, "*#batch columns value_dim"],
    visible: Bool[Tensor, "*#batch #rows #columns"],
) -> Part:
    """The softmax of QKᵀ/√dim over the visible columns, in float32 at least."""
    accurate = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(accurate) @ key.to(accurate).mT / math.sqrt(query.shape[-1])
    return part_of_scores(scores, value, visible)


def part_of_scores(
    scores: Float[Tensor, "*#batch rows columns"],
    value: Float[Tensor, "*#batch columns value_dim"],
    visible: Bool[Tensor, "*#batch #rows #columns"],
) -> Part:
    """The softmax of these scores over the visible columns, in their dtype."""
    scores = scores.masked_fill(~visible, -torch.inf)
    lowest = torch.finfo(scores.dtype).min
    if scores.shape[-1] == 0:
        frame = scores.new_full((*scores.shape[:-1], 1), lowest)
    else:
        frame = scores.detach().amax(dim=-1, keepdim=True).clamp(min=lowest)
    weights = (scores - frame).exp()
    return Part(weights @ value.to(scores.dtype), weights.sum(dim=-1, keepdim=True), frame)


def combined(parts: Sequence[Part]) -> Float[Tensor, "*batch rows value_dim"]:
    """softmax(…) V over the keys of all parts together; 0 for a row that sees none."""
    return reduce(Part.merge, parts).average()


def nearest_blocks(
    num_blocks: int, before: int, after: int, device: torch.device
) -> Int[Tensor, "1 1 num_blocks near"]:
    """For each block the numbers of the blocks next to it, itself included; −1 beyond the ends."""
    own = torch.arange(num_blocks, device=device)[:, None]
    near = own + torch.arange(-before, after + 1, device=device)
    return near.masked_fill((near < 0) | (near >= num_blocks), -1)[None, None]


def real(slots: Slots, sees: Sees, is_causal: bool) -> Sees:
    """A pattern between real tokens alone, in which no causal query sees a later key."""

    def sees_real(of_query: Tensor, of_key: Tensor) -> Tensor:
        visible = sees(of_query, of_key) & is_there(of_key, slots)
        return visible & (of_key <= of_query) if is_causal else visible

    return sees_real


def attend_to_blocks(
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    blocks: Int[Tensor, "#batch #key_heads num_blocks neighbors"],
    block_size: int,
    sees: Sees,
) -> Part:
    """The part of each query over the keys that it sees in the blocks listed for its own block.

    `blocks`: numbers of key blocks, −1 for none; one that is listed twice counts once. Rows that do
    not fill the last block are padded inside, at positions from the length on.

    Cost: O(length · neighbors · block_size · dim).
    """
    batch, heads, _, length, _ = query.shape
    num_blocks = blocks.shape[2]
    missing = num_blocks * block_size - length
    query, key, value = (
        F.pad(x, (0, 0, 0, missing)).unflatten(-2, (num_blocks, block_size))
        for x in (query, key, value)
    )
    is_again = (blocks.unsqueeze(-1) == blocks.unsqueeze(-2)).tril(-1).any(dim=-1)
    blocks = blocks.masked_fill(is_again, -1)
    row = torch.arange(batch, device=key.device)[:, None, None, None]
    head = torch.arange(heads, device=key.device)[None, :, None, None]
    # [batch, key_heads, num_blocks, neighbors · block_size, …]
    key, value = (x[row, head, blocks.clamp(min=0)].flatten(3, 4) for x in (key, value))

    within = torch.arange(block_size, device=key.device)
    starts = torch.arange(num_blocks, device=key.device)[:, None] * block_size
    of_query = (starts + within).unsqueeze(-1)
    of_key = blocks.clamp(min=0).unsqueeze(-1) * block_size + within
    is_listed = (blocks >= 0).unsqueeze(-1).expand_as(of_key)
    of_key, is_listed = (x.flatten(-2).unsqueeze(-2) for x in (of_key, is_listed))
    visible = is_listed & sees(of_query, of_key)
    rows = part(query, key.unsqueeze(2), value.unsqueeze(2), visible.unsqueeze(2))
    return rows.map(lambda x: x.flatten(3, 4)[..., :length, :])


def with_global_rows(
    slots: Slots,
    rows: Float[Tensor, "batch key_heads group length value_dim"],
    start: Int[Tensor, "#batch 1"],
    number: int,
) -> Float[Tensor, "batch key_heads group length value_dim"]:
    """The rows, where the `number` of them from `start` on see every key instead.

    Cost: O(number · length · dim).
    """
    length = rows.shape[3]
    if length == 0:
        return rows
    within = torch.arange(number, device=rows.device)
    query = slots.query.take_along_dim(_along((start + within).clamp(max=length - 1)), dim=3)
    position = torch.arange(length, device=rows.device)
    visible = is_there(position.expand(1, 1, 1, 1, length), slots)
    of_all = combined([part(query, slots.key.unsqueeze(2), slots.value.unsqueeze(2), visible)])
    offset = position - start
    spread = of_all.take_along_dim(_along(offset.clamp(0, number - 1)), dim=3)
    return torch.where(_along((offset >= 0) & (offset < number)), spread, rows)


def _along(x: Tensor) -> Tensor:
    """[batch, length] as it stands beside [batch, key_heads, group, length, dim]."""
    return x[:, None, None, :, None]


def is_there(
    of_key: Int[Tensor, "#batch #key_heads *rest"], slots: Slots
) -> Bool[Tensor, "#batch #key_heads *rest"]:
    """Whether positions are those of real tokens."""
    if slots.is_real is None:
        return of_key < slots.key.shape[2]
    return of_key < slots.count.view(-1, *[1] * (of_key.ndim - 1))
