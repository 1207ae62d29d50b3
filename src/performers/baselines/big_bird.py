"""Big Bird: a window of blocks, global blocks, and random blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from performers.baselines.block_sparse import (
    attend_to_blocks,
    combined,
    nearest_blocks,
    real,
    sees_all,
    with_global_rows,
)
from performers.baselines.drawn import Drawn
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_count

__all__ = ["BigBirdAttention", "BigBirdOptions"]


@dataclass(frozen=True)
class BigBirdOptions:
    """`block_size`: positions of a block. `num_random_blocks`: drawn for each block of queries."""

    block_size: int = 64
    num_random_blocks: int = 3

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        check_count("num_random_blocks", self.num_random_blocks, least=0)


class BigBirdAttention(Drawn):
    """Softmax attention over near, global and random blocks, under one normalizer.

        W  the block itself and its neighbors       blocks    G G G G G G
        G  the first block and, if bidirectional,             G W W · R G
           the last: they see all, all see them               G W W W · G
        R  blocks drawn for each block of queries             G R W W W G
           and head                                           G · R W W G
                                                              G G G G G G

    A causal query sees the first block, its own up to itself, the one before, and random earlier
    blocks. A draw that falls on a block which is seen anyway adds nothing. The last block is that
    of the last real token. There is no cross-attention.

    The draws are a buffer of numbers u from 0 to 1, one block ⌊u · blocks⌋ each (causal: of the
    earlier ones), for `max_length` positions; beyond these they are used again.

    Cost: O(length · (5 + num_random_blocks) · block_size · dim).
    Source: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", Section 2, in its
    internal form (ITC) with blocks (Appendix D).
    """

    draws: Tensor

    def __init__(
        self,
        options: BigBirdOptions = BigBirdOptions(),
        num_heads: int = 1,
        max_length: int = 4096,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """`num_heads`: key heads that draw for themselves; 1 for a draw that all share."""
        super().__init__(seed, layer)
        self.options = options
        num_blocks = math.ceil(max_length / options.block_size)
        self.own_tensor("draws", num_heads, num_blocks, options.num_random_blocks)
        self.reset_parameters()

    def draw(self, generator: Generator) -> None:
        self.draws.copy_(torch.rand(self.draws.shape, generator=generator, device="cpu"))

    def random_blocks(
        self, num_blocks: int, number: Int[Tensor, "batch 1"], is_causal: bool
    ) -> Int[Tensor, "batch key_heads num_blocks num_random"]:
        """The random blocks of each block, among the `number` of each sequence."""
        own = torch.arange(num_blocks, device=self.draws.device)
        drawn = self.draws[:, own % self.draws.shape[1]].float()
        among = own[:, None] if is_causal else number[:, None, None]
        # Where u · blocks rounds up to the number of blocks, and where there are none.
        highest = (among - 1).clamp(min=0)
        return (drawn * among).long().minimum(highest).expand(len(number), -1, -1, -1)

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """Shapes and masks as in `favor_attention`, with one query per key."""
        slots = real_tokens(
            "Big Bird attention",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        size, length = self.options.block_size, key.shape[2]
        num_blocks = math.ceil(length / size)
        number = (slots.count + size - 1) // size  # blocks with real tokens
        last = (number - 1).clamp(min=0)
        near = nearest_blocks(num_blocks, 1, 0 if is_causal else 1, key.device)
        drawn = self.random_blocks(num_blocks, number, is_causal)
        first = torch.zeros_like(last)
        ends = [first] if is_causal else [first, last]
        listed = [near, *(end[:, :, None, None] for end in ends), drawn]
        shape = torch.broadcast_shapes(*(x.shape[:3] for x in (near, drawn)))
        blocks = torch.cat([x.expand(*shape, -1) for x in listed], dim=-1)
        sees = real(slots, sees_all, is_causal)
        rows = combined([attend_to_blocks(slots.query, slots.key, slots.value, blocks, size, sees)])
        if not is_causal:  # causal: what the first block sees is in the lists
            rows = with_global_rows(slots, rows, first, size)
            rows = with_global_rows(slots, rows, last * size, size)
        return rows_of_tokens(slots, rows)
