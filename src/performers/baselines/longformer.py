"""Longformer: a window around each position, and a few tokens that see all and are seen by all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.baselines.block_sparse import (
    attend_to_blocks,
    combined,
    nearest_blocks,
    real,
    with_global_rows,
)
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_count

__all__ = ["LongformerAttention", "LongformerOptions"]


@dataclass(frozen=True)
class LongformerOptions:
    """`window_size`: positions that a query sees on each side of its own; transformers'
    `attention_window` counts both sides and is twice as large. `num_global`: the first so many
    tokens are global.
    """

    window_size: int = 256
    num_global: int = 1

    def __post_init__(self) -> None:
        check_count("window_size", self.window_size)
        check_count("num_global", self.num_global, least=0)


class LongformerAttention(nn.Module):
    """Softmax attention over a window and global tokens, under one normalizer.

        i sees j  if  |i − j| ≤ w,  or j < g,  or i < g;  causal: and j ≤ i

        w = 1, g = 1    ■ ■ ■ ■ ■ ■
                        ■ ■ ■ · · ·
                        ■ ■ ■ ■ · ·
                        ■ · ■ ■ ■ ·
                        ■ · · ■ ■ ■
                        ■ · · · ■ ■

    Queries, keys and values of global tokens are those of the layer; the published models project
    them once more for global attention, which a mechanism without weights cannot. Windows are
    without gaps (no dilation). There is no cross-attention.

    Cost: O(length · (window_size + num_global) · dim).
    Source: Beltagy et al. 2020, "Longformer: The Long-Document Transformer", Section 3.1.
    """

    def __init__(self, options: LongformerOptions = LongformerOptions()) -> None:
        super().__init__()
        self.options = options

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
            "Longformer attention",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        window = self.options.window_size
        num_global = min(self.options.num_global, key.shape[2])
        num_blocks = math.ceil(key.shape[2] / window)
        near = nearest_blocks(num_blocks, 1, 0 if is_causal else 1, key.device)
        first = torch.arange(math.ceil(num_global / window), device=key.device)
        blocks = torch.cat([near, first.expand(1, 1, num_blocks, -1)], dim=-1)

        def sees(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((i - j).abs() <= window) | (j < num_global)

        visible = real(slots, sees, is_causal)
        rows = combined(
            [attend_to_blocks(slots.query, slots.key, slots.value, blocks, window, visible)]
        )
        if num_global and not is_causal:  # causal: what global tokens see is in their blocks
            start = torch.zeros(1, 1, dtype=torch.int64, device=key.device)
            rows = with_global_rows(slots, rows, start, num_global)
        return rows_of_tokens(slots, rows)
