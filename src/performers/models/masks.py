"""What models make of the masks and positions of transformers: which tokens are real, where, and
of which sequence.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_attention_mask, check_tensor
from performers.functional.segments import restarts

__all__ = ["Packing", "count_positions", "if_several", "packed_segments", "padding_mask"]


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
    check_tensor("attention_mask", attention_mask)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
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
    of use to kernels. In a compiled graph the number of sequences would have to be known: lengths
    and numbers break it, and positions that restart are an error.

    Raises ValueError for lengths that are not those of the row.
    """
    if cu_seq_lens_q is not None:
        if not torch.compiler.is_exporting():  # attention refuses packed sequences there
            _check_ends(batch, length, cu_seq_lens_q, cu_seq_lens_k)
        place = torch.arange(length, dtype=cu_seq_lens_q.dtype, device=cu_seq_lens_q.device)
        return torch.bucketize(place, cu_seq_lens_q, right=True).unsqueeze(0) - 1
    if seq_idx is not None:
        return seq_idx
    if position_ids is None or length < 2 or position_ids.is_meta:
        return None
    segment_ids = if_several(restarts(position_ids))
    return None if segment_ids is None else segment_ids.expand(batch, -1)


def if_several(segment_ids: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"] | None:
    """Numbers that are not all 0; None where each row is one sequence.

    A compiled graph cannot ask, and takes them for one sequence: there others are an error, raised
    when the graph runs.
    """
    if not torch.compiler.is_compiling():
        return segment_ids if bool(segment_ids.any()) else None
    if not torch.onnx.is_in_onnx_export():  # ONNX has no assertions
        torch._assert_async(
            (segment_ids == 0).all(),
            "positions that restart pack several sequences into a row, and a compiled graph "
            "cannot tell them apart: say where they end by seq_idx= or cu_seq_lens_q= too, as "
            "DataCollatorWithFlattening(return_seq_idx=True) does, and compile without "
            "fullgraph=True. Or pass a padded batch and an attention_mask.",
        )
    return None


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


@torch.compiler.disable(
    reason="where packed sequences end is said by the numbers in cu_seq_lens_q, which a graph "
    "cannot hold: compile without fullgraph=True, or pass a padded batch and a mask"
)
def _check_ends(batch: int, length: int, ends: Tensor, ends_of_keys: Tensor | None) -> None:
    """Raise ValueError for ends of sequences that are not those of the only row."""
    found = ends.tolist()
    if not (batch == 1 and found == sorted(found) and found[:1] + found[-1:] == [0, length]):
        raise ValueError(
            "cu_seq_lens_q must go from 0 to the length of a single row, as "
            f"DataCollatorWithFlattening makes it: got {found} for {batch} rows of {length}."
        )
    if ends_of_keys is not None and ends_of_keys.tolist() != found:
        raise ValueError(
            "packed sequences attend to themselves, so cu_seq_lens_k must be cu_seq_lens_q: "
            f"got {ends_of_keys} and {ends}."
        )
