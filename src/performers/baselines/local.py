"""Local attention: each position sees the positions around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.baselines.block_sparse import attend_to_blocks, combined, nearest_blocks, real
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_count

__all__ = ["LocalAttention", "LocalOptions"]


@dataclass(frozen=True)
class LocalOptions:
    """`window_size`: how many positions a query sees on each side of its own."""

    window_size: int = 128

    def __post_init__(self) -> None:
        check_count("window_size", self.window_size)


class LocalAttention(nn.Module):
    """Softmax attention over the keys at most `window_size` positions away.

        out_i = Σ_j softmax_j(q_i·k_j/√dim) v_j    over |i − j| ≤ w,  causal: i − w ≤ j ≤ i

        w = 1   ■ ■ · · ·      causal   ■ · · · ·
                ■ ■ ■ · ·               ■ ■ · · ·
                · ■ ■ ■ ·               · ■ ■ · ·
                · · ■ ■ ■               · · ■ ■ ·
                · · · ■ ■               · · · ■ ■

    It cannot relate positions further apart than w in one layer, and has no cross-attention.

    Cost: O(length · window_size · dim).
    Source: Parmar et al. 2018, "Image Transformer"; Tay et al. 2021, "Long Range Arena".
    """

    def __init__(self, options: LocalOptions = LocalOptions()) -> None:
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
            "local attention",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        window = self.options.window_size
        blocks = nearest_blocks(
            math.ceil(key.shape[2] / window), 1, 0 if is_causal else 1, key.device
        )
        sees = real(slots, lambda sequence, head, i, j: (i - j).abs() <= window, is_causal)
        near = attend_to_blocks(slots.query, slots.key, slots.value, blocks, window, sees)
        return rows_of_tokens(slots, combined([near]))
