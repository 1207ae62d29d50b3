"""Packed sequences in converted models: where one ends, by masks and by what models pass on."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from performers.convert.sites import is_cross_attention, layer_number, layer_types
from performers.models.masks import Packing, if_several, packed_segments

__all__ = ["is_packed", "segments", "within_sequences"]


def is_packed(attention_mask: Tensor | None) -> bool:
    """Whether `favor_mask` made it of packed sequences."""
    is_of_numbers = attention_mask is not None and attention_mask.dtype == torch.int64
    return is_of_numbers and attention_mask is not None and attention_mask.ndim == 2


def segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Int[Tensor, "batch length"] | None:
    """The numbers of packed sequences, from the mask that `favor_mask` made, or from what models
    pass on to attention: lengths, numbers or, in causal attention without a mask, positions that
    restart. None where there is a mask of pairs, which says it.
    """
    if attention_mask is not None and is_packed(attention_mask):
        if not torch.compiler.is_compiling():
            return attention_mask
        given = _given(module, query, key, options, None)
        return if_several(attention_mask) if given is None else given
    if _is_of_pairs(attention_mask):
        return None
    position_ids = options.get("position_ids") if is_causal and attention_mask is None else None
    if position_ids is not None and position_ids.ndim != 2:  # of an image, in several directions
        position_ids = None
    return _given(module, query, key, options, position_ids)


def within_sequences(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor | None:
    """A mask of pairs cut at the ends of packed sequences, where lengths or numbers beside it say
    where they are. `favor_mask` makes it of a window and positions, and does not get them.

    Raises ValueError where the pairs would be others: for chunks, which are counted from where a
    sequence begins, and for blocks.
    """
    if not _is_of_pairs(attention_mask):
        return attention_mask
    assert attention_mask is not None, "it is of pairs"
    segment_ids = _given(module, query, key, options, None)
    if segment_ids is None:
        return attention_mask
    number, kinds = layer_number(module) or 0, layer_types(module)
    has_chunks = number < len(kinds) and kinds[number] == "chunked_attention"
    if has_chunks or attention_mask.ndim != 4:
        raise ValueError(
            f"{type(module).__name__} attends {'in chunks' if has_chunks else 'to blocks'}, and "
            "these are not those of packed sequences that cu_seq_lens_q or seq_idx tell apart. "
            "Give each sequence a row of its own, with an attention_mask"
            + (", or pass position_ids that restart." if has_chunks else ".")
        )
    same = (segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)).unsqueeze(1)
    if attention_mask.dtype == torch.bool:
        return attention_mask & same
    return attention_mask.masked_fill(~same, -torch.inf)


def _is_of_pairs(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.shape[1:-1] not in ((), (1, 1))


def _given(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    options: dict[str, Any],
    position_ids: Tensor | None,
) -> Int[Tensor, "batch length"] | None:
    if is_cross_attention(module) or query.shape[2] != key.shape[2]:
        return None
    given = {word: options.get(word) for word in Packing.__annotations__}
    return packed_segments(query.shape[0], query.shape[2], position_ids, **given)
