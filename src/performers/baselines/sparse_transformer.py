"""The Sparse Transformer: near positions, and every l-th or every last of l positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from performers.backends.slots import Slots
from performers.baselines.block_sparse import (
    Part,
    attend_to_blocks,
    combined,
    nearest_blocks,
    part,
    real,
    sees_all,
)
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_choice, check_count

__all__ = ["SparseOptions", "SparseTransformerAttention"]

PATTERNS = ("strided", "fixed")


@dataclass(frozen=True)
class SparseOptions:
    """`pattern`: "strided" or "fixed". `stride`: l, best near √length. `num_summaries`: c of the
    fixed pattern, how many positions at the end of each block everyone after it sees.
    """

    pattern: str = "strided"
    stride: int = 128
    num_summaries: int = 8

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, PATTERNS)
        check_count("stride", self.stride)
        check_count("num_summaries", self.num_summaries)
        if self.pattern == "fixed" and self.num_summaries > self.stride:
            raise ValueError(
                f"num_summaries are positions of a block of stride={self.stride}: at most so many, "
                f"got {self.num_summaries}."
            )


class SparseTransformerAttention(nn.Module):
    """Softmax attention over the union of the two sets of a sparse factorization.

        strided    |i − j| ≤ l,  or (i − j) mod l = 0
        fixed      ⌊i/l⌋ = ⌊j/l⌋,  or j mod l ≥ l − c
        causal     and j ≤ i

        strided, l = 3    ■ · · · · · ·      fixed, l = 3, c = 1    ■ · · · · · ·
        (causal)          ■ ■ · · · · ·      (causal)               ■ ■ · · · · ·
                          ■ ■ ■ · · · ·                             ■ ■ ■ · · · ·
                          ■ ■ ■ ■ · · ·                             · · ■ ■ · · ·
                          · ■ ■ ■ ■ · ·                             · · ■ ■ ■ · ·
                          · · ■ ■ ■ ■ ·                             · · ■ ■ ■ ■ ·
                          ■ · · ■ ■ ■ ■                             · · ■ · · ■ ■

    Every head sees the union, the paper's "merged head"; the paper may also give the two sets to
    different heads or layers. There is no cross-attention. A pair that the causal strided pattern
    scores is scored both ways if bidirectional; the fixed summaries are seen from everywhere.

    Cost: O(length · (l + c · length / l) · dim), which is O(length^1.5) for l ≈ √length.
    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", Section 4.3.
    """

    def __init__(self, options: SparseOptions = SparseOptions()) -> None:
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
            "Sparse Transformer attention",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        stride = self.options.stride
        num_blocks = math.ceil(key.shape[2] / stride)
        if self.options.pattern == "strided":
            blocks = nearest_blocks(num_blocks, 1, 0 if is_causal else 1, key.device)
            sees = real(slots, lambda sequence, head, i, j: (i - j).abs() <= stride, is_causal)
            far = _columns(slots, stride, is_causal)
        else:
            blocks = nearest_blocks(num_blocks, 0, 0, key.device)
            sees = real(slots, sees_all, is_causal)
            far = _summaries(slots, stride, self.options.num_summaries, is_causal)
        near = attend_to_blocks(slots.query, slots.key, slots.value, blocks, stride, sees)
        return rows_of_tokens(slots, combined([near, far]))


def _columns(slots: Slots, stride: int, is_causal: bool) -> Part:
    """The part over keys a multiple of the stride away, other than 0 and 1 times.

    With rows of `stride` positions under each other these are the columns, whose positions the
    transposition brings side by side.
    """
    length = slots.key.shape[2]
    num_rows = math.ceil(length / stride)

    def transposed(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, num_rows * stride - length))
        return padded.unflatten(-2, (num_rows, stride)).transpose(-2, -3)

    query, key, value = (transposed(x) for x in (slots.query, slots.key, slots.value))
    row = torch.arange(num_rows, device=key.device)
    distance = row[:, None] - row
    visible = (distance if is_causal else distance.abs()) > 1
    # The positions of the keys of each column: [stride, 1, num_rows]
    of_key = row * stride + torch.arange(stride, device=key.device)[:, None, None]
    visible = visible & (of_key < slots.count.view(-1, 1, 1, 1, 1, 1))
    column = part(query, key.unsqueeze(2), value.unsqueeze(2), visible)
    return column.map(lambda x: x.transpose(-2, -3).flatten(3, 4)[..., :length, :])


def _summaries(slots: Slots, stride: int, num_summaries: int, is_causal: bool) -> Part:
    """The part over the last positions of each block other than a query's own."""
    length = slots.key.shape[2]
    i = torch.arange(length, device=slots.key.device)
    chosen = i[i % stride >= stride - num_summaries]
    other = i[:, None] // stride != chosen // stride
    visible = other & (chosen <= i[:, None]) if is_causal else other
    visible = visible & (chosen < slots.count[:, :, None])
    key, value = (x[:, :, chosen].unsqueeze(2) for x in (slots.key, slots.value))
    return part(slots.query, key, value, visible[:, None, None])
