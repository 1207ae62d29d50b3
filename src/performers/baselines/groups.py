"""Attention among positions that a hash or a clustering puts side by side, in chunks.

    positions      0 1 2 3 4 5 6 7 8 9        a letter: the group of a position
    groups         b a b b c a b c b a
    places         1 5 9 · │ 0 2 3 6 │ 8 · · · │ 4 7 · ·      each group begins a chunk
                     a          b         b         c
    a chunk sees itself, and chunks beside it of the same group

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

from performers.baselines.block_sparse import Part, Sees, attend_to_blocks, nearest_blocks

__all__ = ["Places", "attend_to_chunks", "chunks_beside", "end_to_end", "group_by_group"]


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


def end_to_end(group: Int[Tensor, "batch heads length"], chunk_size: int) -> Places:
    """Groups one after the other, cut into chunks wherever they end."""
    order = group.argsort(dim=-1, stable=True)
    number = math.ceil(group.shape[-1] / chunk_size) * chunk_size
    return Places.of(order.argsort(dim=-1), number)


def group_by_group(
    group: Int[Tensor, "batch heads length"], num_groups: int, chunk_size: int
) -> tuple[Places, Int[Tensor, "batch heads num_chunks"]]:
    """Groups one after the other, each from the beginning of a chunk, and the group of each chunk.

    There are as many chunks as `num_groups` groups may need; those behind the last group have
    number `num_groups`.
    """
    length = group.shape[-1]
    size = torch.zeros(*group.shape[:-1], num_groups, dtype=torch.int64, device=group.device)
    size = size.scatter_add(-1, group, torch.ones_like(group))
    order = group.argsort(dim=-1, stable=True)
    start = size.cumsum(dim=-1) - size
    rank = torch.arange(length, device=group.device) - start.gather(-1, group.gather(-1, order))
    rank = rank.gather(-1, order.argsort(dim=-1))
    end = ((size + chunk_size - 1) // chunk_size).cumsum(dim=-1)  # in chunks
    first = F.pad(end[..., :-1], (1, 0)) * chunk_size
    # Each group leaves less than a chunk empty.
    num_chunks = length // chunk_size + num_groups
    chunk = torch.arange(num_chunks, device=group.device).expand(*group.shape[:-1], -1)
    of_chunk = torch.searchsorted(end, chunk.contiguous(), right=True)
    return Places.of(first.gather(-1, group) + rank, num_chunks * chunk_size), of_chunk


def chunks_beside(
    of_chunk: Int[Tensor, "batch heads num_chunks"], before: int, after: int
) -> Int[Tensor, "batch heads num_chunks near"]:
    """For each chunk the numbers of itself and of those beside it in its group; −1 for none."""
    near = nearest_blocks(of_chunk.shape[-1], before, after, of_chunk.device)
    near = near.expand(*of_chunk.shape[:2], -1, -1)
    beside = of_chunk.gather(-1, near.clamp(min=0).flatten(2)).view_as(near)
    return near.masked_fill(beside != of_chunk.unsqueeze(-1), -1)


def attend_to_chunks(
    query: Float[Tensor, "batch heads group length dim"],
    key: Float[Tensor, "batch heads length dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    position: Int[Tensor, "batch heads places"],
    chunks: Int[Tensor, "#batch #heads num_chunks neighbors"],
    chunk_size: int,
    sees: Sees,
) -> Part:
    """The part of the query at each place over the keys in the chunks listed for its own.

    `sees` is asked about positions, not places; places without a position hold the length.
    """

    def placed(x: Tensor) -> Tensor:
        index = position.unsqueeze(-1) if x.ndim == 4 else position[:, :, None, :, None]
        return F.pad(x, (0, 0, 0, 1)).take_along_dim(index, dim=-2)

    def sees_places(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return sees(sequence, head, position[sequence, head, i], position[sequence, head, j])

    return attend_to_blocks(
        placed(query), placed(key), placed(value), chunks, chunk_size, sees_places
    )
