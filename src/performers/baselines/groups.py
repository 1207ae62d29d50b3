"""Attention among positions that a hash or a clustering puts side by side, in chunks.

    positions      0 1 2 3 4 5 6 7 8 9        a letter: the group of a position
    groups         b a b b c a b c b a
    places         1 5 9 · │ 0 2 3 6 │ 8 · · · │ 4 7 · ·      each group begins a chunk
                     a          b         b         c
    a chunk sees itself, and chunks beside it of the same group

On a CPU a chunk is computed in blocks, and groups begin at the next block, so that a group leaves
less empty.

The place of a position in its group is the number of earlier positions in it, which no later
position changes. Where all groups lie end to end instead, the chunk of a position depends on how
many later ones are in the groups before, and causal attention would be told about its future.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.baselines.block_sparse import Part, Sees, attend_to_blocks, rows_at

__all__ = ["Blocks", "Places", "attend_to_blocks_of_places", "end_to_end", "group_by_group"]

# Positions of a block on a CPU, where a chunk has that many: fewer rows and matrices are small.
SMALLEST = 32


class Places(NamedTuple):
    """An order of positions, in chunks. `place` of each position; `position` at each place, the
    length where there is none.
    """

    place: Int[Tensor, "batch heads length"]
    position: Int[Tensor, "batch heads places"]

    @classmethod
    def of(cls, place: Int[Tensor, "batch heads length"], number: int) -> Places:
        """The order in which each position has this place, among `number` of them."""
        length = place.shape[-1]
        position = torch.full((*place.shape[:-1], number), length, device=place.device)
        source = torch.arange(length, device=place.device).expand_as(place)
        return cls(place, position.scatter(-1, place, source))


class Blocks(NamedTuple):
    """Places cut into blocks of a size. `near`: numbers of those that a block sees, −1 for none."""

    size: int
    near: Int[Tensor, "#batch #heads num_blocks neighbors"]


def end_to_end(group: Int[Tensor, "batch heads length"], chunk_size: int) -> Places:
    """Groups one after the other, cut into chunks wherever they end."""
    order = group.argsort(dim=-1, stable=True)
    number = math.ceil(group.shape[-1] / chunk_size) * chunk_size
    return Places.of(order.argsort(dim=-1), number)


def group_by_group(
    group: Int[Tensor, "batch heads length"],
    num_groups: int,
    chunk_size: int,
    before: int,
    after: int,
) -> tuple[Places, Blocks]:
    """Groups one after the other, each from the beginning of a block. A block sees its chunk and so
    many chunks `before` and `after` it, of the same group.

    There are as many blocks as `num_groups` groups may need; those behind the last group see
    nothing.
    """
    length, device = group.shape[-1], group.device
    block = _block_size(chunk_size, device)
    size = torch.zeros(*group.shape[:-1], num_groups, dtype=torch.int64, device=device)
    size = size.scatter_add(-1, group, torch.ones_like(group))
    in_blocks = (size + block - 1) // block
    end = in_blocks.cumsum(dim=-1)
    first = end - in_blocks
    # Sorted by group and position, a position comes at its place but for what groups leave empty.
    of_sorted, order = group.sort(dim=-1, stable=True)
    empty = first * block - (size.cumsum(dim=-1) - size)
    place = torch.arange(length, device=device) + empty.gather(-1, of_sorted)
    place = torch.zeros_like(place).scatter(-1, order, place)

    # Each group leaves less than a block empty.
    num_blocks = length // block + num_groups
    number = torch.arange(num_blocks, device=device).expand(*group.shape[:-1], -1).contiguous()
    of_block = torch.searchsorted(end, number, right=True)  # num_groups behind the last group
    first, in_blocks = (F.pad(x, (0, 1)).gather(-1, of_block) for x in (first, in_blocks))
    per_chunk = chunk_size // block
    begins = ((number - first) // per_chunk - before) * per_chunk
    within = torch.arange((before + 1 + after) * per_chunk, device=device)
    near = begins.unsqueeze(-1) + within
    first, in_blocks = first.unsqueeze(-1), in_blocks.unsqueeze(-1)
    near = (first + near).masked_fill((near < 0) | (near >= in_blocks), -1)
    return Places.of(place, num_blocks * block), Blocks(block, near)


def _block_size(chunk_size: int, device: torch.device) -> int:
    """The least share of a chunk, by halves, that has `SMALLEST` positions."""
    # flex_attention has a table of all pairs of blocks, which is the smaller the larger they are.
    while device.type != "cuda" and chunk_size % 2 == 0 and chunk_size >= 2 * SMALLEST:
        chunk_size //= 2
    return chunk_size


def attend_to_blocks_of_places(
    query: Float[Tensor, "batch heads group length dim"],
    key: Float[Tensor, "batch heads length dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    position: Int[Tensor, "batch heads places"],
    blocks: Blocks,
    sees: Sees,
) -> Part:
    """The part of the query at each place over the keys in the blocks that its own sees.

    `sees` is asked about positions, not places; places without a position hold the length.
    """

    def placed(x: Tensor) -> Tensor:
        return rows_at(F.pad(x, (0, 0, 0, 1)), position if x.ndim == 4 else position.unsqueeze(2))

    def sees_places(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(sequence, head, position[sequence, head, i], position[sequence, head, j])

    return attend_to_blocks(
        placed(query), placed(key), placed(value), blocks.near, blocks.size, sees_places
    )
