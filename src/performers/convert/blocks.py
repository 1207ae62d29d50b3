"""Blocks of positions that see each other in a causal model: prompts, and images in texts.

transformers makes masks of pairs of them. Here the mask of a forward pass is two numbers for each
position, (batch, 2, length): whether it is real, and how many keys it sees.

    block_sequence_ids   −1  −1   0   0   0  −1   1   1  −1
    keys that are seen    1   2   5   5   5   6   8   8   9
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from performers.functional.masks import Seen, keys_of_staircase

__all__ = ["BLOCKS", "is_of_blocks", "keys_of_blocks", "mask_of_blocks"]

BLOCKS = "blockwise_overlay"  # the function of transformers that makes such masks


def mask_of_blocks(
    overlay: Any, attention_mask: Bool[Tensor, "batch length"] | None, length: int
) -> Int[Tensor, "batch 2 length"] | None:
    """From the mask function of transformers and the padding; None if a block is in two places."""
    (blocks,) = (cell.cell_contents for cell in overlay.__closure__)
    blocks = blocks[:, :length]
    is_real = torch.ones_like(blocks, dtype=torch.bool)
    if attention_mask is not None:
        is_real = attention_mask[:, :length].bool()
    # Padding may have been given the number of a block. No one sees it.
    blocks = blocks.where(is_real, -1)
    begins = blocks.diff(dim=1, prepend=torch.full_like(blocks[:, :1], -2)) != 0
    number = begins.long().cumsum(dim=1)
    first = blocks.where(begins & (blocks >= 0), -1).sort(dim=1).values
    if bool(((first[:, 1:] == first[:, :-1]) & (first[:, 1:] >= 0)).any()):
        return None
    own = torch.arange(1, length + 1, device=blocks.device).expand_as(blocks)
    # The last position of each block, by its number among the blocks of the row.
    ends = torch.zeros(len(blocks), length + 1, dtype=torch.int64, device=blocks.device)
    ends = ends.scatter_reduce(1, number, own, "amax")
    return torch.stack([is_real.long(), ends.gather(1, number).where(blocks >= 0, own)], dim=1)


def is_of_blocks(attention_mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it is a mask of such blocks."""
    is_of_numbers = attention_mask is not None and attention_mask.dtype == torch.int64
    return is_of_numbers and attention_mask is not None and attention_mask.ndim == 3


def keys_of_blocks(mask: Int[Tensor, "batch 2 length"]) -> Seen:
    """What such a mask says."""
    is_real, seen_lengths = mask.unbind(dim=1)
    return keys_of_staircase(is_real.bool(), seen_lengths)
