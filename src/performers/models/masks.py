"""What models make of the masks and positions of transformers: which tokens are real, where, and
of which sequence.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_attention_mask
from performers.functional.segments import restarts

__all__ = ["Packing", "count_positions", "packed_segments", "padding_mask"]


class Packing(TypedDict, total=False):
    """How transformers' collators say where packed sequences end, besides by position_ids."""

    cu_seq_lens_q: Int[Tensor, " sequences_and_one"] | None
    cu_seq_lens_k: Int[Tensor, " sequences_and_one"] | None
    max_length_q: int | None
    max_length_k: int | None
    seq_idx: Int[Tensor, "batch length"] | None


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


def packed_segments(
    batch: int,
    length: int,
    position_ids: Int[Tensor, "rows length"] | None,
    *,
    cu_seq_lens_q: Int[Tensor, " sequences_and_one"] | None = None,
    cu_seq_lens_k: Int[Tensor, " sequences_and_one"] | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    seq_idx: Int[Tensor, "batch length"] | None = None,
) -> Int[Tensor, "batch length"] | None:
    """Numbers that change where a new one of packed sequences begins; None if each row is one.

    From `cu_seq_lens_q`, where the sequences of the only row begin and end, or `seq_idx`, which has
    a number for each token, or else positions that do not count on by one. Longest lengths are only
    of use to kernels. In a compiled graph the number of sequences would have to be known: there
    positions that restart are an error, raised when the graph runs.

    Raises ValueError for lengths that are not those of the row.
    """
    if cu_seq_lens_q is not None:
        ends = cu_seq_lens_q.tolist()
        is_same = cu_seq_lens_k is None or cu_seq_lens_k.tolist() == ends
        if not (batch == 1 and ends == sorted(ends) and ends[:1] + ends[-1:] == [0, length]):
            raise ValueError(
                "cu_seq_lens_q must go from 0 to the length of a single row, as "
                f"DataCollatorWithFlattening makes it: got {ends} for {batch} rows of {length}."
            )
        if not is_same:
            raise ValueError(
                "packed sequences attend to themselves, so cu_seq_lens_k must be cu_seq_lens_q: "
                f"got {cu_seq_lens_k} and {cu_seq_lens_q}."
            )
        lengths = cu_seq_lens_q.diff()
        number = torch.arange(len(lengths), device=lengths.device)
        return number.repeat_interleave(lengths).unsqueeze(0)
    if seq_idx is not None:
        return seq_idx
    if position_ids is None or length < 2 or position_ids.is_meta:
        return None
    segment_ids = restarts(position_ids)
    if torch.compiler.is_compiling():
        if not torch.compiler.is_exporting():
            torch._assert_async(
                (segment_ids == 0).all(),
                "positions that restart pack several sequences into a row, and a compiled graph "
                "cannot tell them apart: pass a padded batch and an attention_mask, or do not "
                "compile.",
            )
        return None
    return segment_ids.expand(batch, -1) if bool(segment_ids.any()) else None


def count_positions(
    key_padding_mask: Bool[Tensor, "batch past_and_length"] | None,
    past_length: int,
    embeddings: Float[Tensor, "batch length hidden"],
    segment_ids: Int[Tensor, "batch length"] | None = None,
) -> Int[Tensor, "rows length"]:
    """0, 1, 2, … over real tokens, so that padding on the left moves no position; in each of packed
    sequences anew.
    """
    if segment_ids is not None:
        is_real = torch.ones_like(segment_ids, dtype=torch.bool)
        is_real = (is_real if key_padding_mask is None else key_padding_mask).long()
        before = is_real.cumsum(dim=1) - is_real
        begins = segment_ids.diff(dim=1, prepend=segment_ids[:, :1]) != 0
        return before - (before * begins).cummax(dim=1).values
    length = past_length + embeddings.shape[1]
    if key_padding_mask is None:
        return torch.arange(past_length, length, device=embeddings.device).unsqueeze(0)
    # The number of real tokens before each; −1 for padding on the left, which the clamp makes 0.
    counted = key_padding_mask.long().cumsum(dim=-1) - 1
    return counted.clamp(min=0)[:, past_length:]
