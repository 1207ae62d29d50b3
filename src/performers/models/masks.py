"""What models make of the attention_mask of transformers: which tokens are real, and where."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_attention_mask

__all__ = ["count_positions", "padding_mask"]


def padding_mask(
    attention_mask: Tensor | None, batch: int, past_length: int, length: int
) -> Bool[Tensor, "batch past_and_length"] | None:
    """The attention_mask of transformers as a bool mask of real keys."""
    if attention_mask is None:
        return None
    if attention_mask.is_floating_point():
        raise TypeError(
            "attention_mask must be bool or whole numbers, 1 for a real token and 0 for padding, "
            f"got {attention_mask.dtype}. An additive mask has no linear-time form."
        )
    shape = (batch, past_length + length)
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must be (batch, length) = {shape}, the cached positions "
            f"included, got {tuple(attention_mask.shape)}. Masks of pairs of positions have no "
            "linear-time form."
        )
    if length > 1 or past_length == 0:  # not once more for each token, which a GPU would wait for
        check_attention_mask("attention_mask", attention_mask)
    return attention_mask.bool()


def count_positions(
    key_padding_mask: Bool[Tensor, "batch past_and_length"] | None,
    past_length: int,
    embeddings: Float[Tensor, "batch length hidden"],
) -> Int[Tensor, "rows length"]:
    """0, 1, 2, … over real tokens, so that padding on the left moves no position."""
    length = past_length + embeddings.shape[1]
    if key_padding_mask is None:
        return torch.arange(past_length, length, device=embeddings.device).unsqueeze(0)
    # The number of real tokens before each; −1 for padding on the left, which the clamp makes 0.
    counted = key_padding_mask.long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, past_length:]
