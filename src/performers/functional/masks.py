"""Masks of pairs of positions, as others write them, read as causality and padding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Seen", "is_hidden", "keys_of_pairs", "keys_of_staircase"]

# An additive mask hides by −∞, by the least number of its dtype, by −1e9 or by −1e4, which half
# precision can hold: exp of any of these is 0 in every dtype.
HIDING = -1e4


class Seen(NamedTuple):
    """Which keys the queries of a call see, as `favor_attention` takes it."""

    key_padding_mask: Bool[Tensor, "batch key_length"] | None
    is_causal: bool
    segment_ids: Int[Tensor, "batch key_length"] | None = None
    prefix_lengths: Int[Tensor, " batch"] | None = None
    seen_lengths: Int[Tensor, "batch query_length"] | None = None


def is_hidden(mask: Tensor) -> Bool[Tensor, "*shape"] | None:
    """Where an additive mask hides, None for a bias: one that adds something other than 0
    elsewhere, or learns to.
    """
    hidden = mask <= HIDING
    return hidden if not mask.requires_grad and bool((hidden | (mask == 0)).all()) else None


def keys_of_pairs(
    visible: Bool[Tensor, "batch heads query_length key_length"], *, prefers_causal: bool
) -> Seen | str:
    """The padding, the packed sequences or the staircase, and whether causality, that leave just
    these pairs visible; or in words why there are none.

    The queries are the last of the sequence that the keys are. A padded query, whose own key is
    hidden from all, may also see nothing. `prefers_causal` decides where both readings hold, as
    they do for one query. Blocks along the diagonal are packed sequences without padding.

    Cost: O(batch · heads · query_length · key_length), as the mask itself.
    """
    pairs = visible[:, 0]
    if not bool((visible == pairs.unsqueeze(1)).all()):
        return "it differs between heads"
    query_length, key_length = pairs.shape[1:]
    offset = key_length - query_length
    is_real = pairs.any(dim=1)
    is_free = torch.zeros_like(pairs[:, :, 0])
    if offset >= 0:
        is_free = ~is_real[:, offset:] & ~pairs.any(dim=2)
    earlier = torch.ones_like(pairs[0]).tril(offset)
    unexplained = []
    for is_causal in (prefers_causal, not prefers_causal):
        expected = is_real.unsqueeze(1) & earlier if is_causal else is_real.unsqueeze(1)
        wrong = (pairs != expected) & ~is_free.unsqueeze(2)
        if not bool(wrong.any()):
            return Seen(None if bool(is_real.all()) else is_real, is_causal)
        unexplained.append((is_causal, wrong))
    if offset == 0 and bool(is_real.all()):
        sees_the_one_before = pairs.diagonal(-1, dim1=1, dim2=2)
        segment_ids = F.pad((~sees_the_one_before).cumsum(dim=1), (1, 0))
        blocks = segment_ids.unsqueeze(1) == segment_ids.unsqueeze(2)
        for is_causal, expected in ((True, blocks & earlier), (False, blocks)):
            if torch.equal(pairs, expected):
                return Seen(None, is_causal, segment_ids)
    # Up to the last key that each query sees.
    seen_lengths = (pairs * torch.arange(1, key_length + 1, device=pairs.device)).amax(dim=2)
    position = torch.arange(key_length, device=pairs.device)
    never_falls = (seen_lengths == seen_lengths.cummax(dim=1).values) | is_free
    expected = is_real.unsqueeze(1) & (position < seen_lengths.unsqueeze(2))
    if bool(never_falls.all()) and torch.equal(pairs, expected):
        return keys_of_staircase(is_real, seen_lengths)
    # The reading that explains more tells more of what is wrong.
    is_causal, wrong = min(unexplained, key=lambda reading: int(reading[1].sum()))
    row, query, key = wrong.nonzero()[0].tolist()
    reading = "causality and padding" if is_causal else "padding"
    return (
        f"it is not {reading}: of sequence {row}, query {query} "
        f"{'sees' if pairs[row, query, key] else 'does not see'} key {key}"
    )


def keys_of_staircase(
    is_real: Bool[Tensor, "batch key_length"], seen_lengths: Int[Tensor, "batch query_length"]
) -> Seen:
    """Queries that see the first so many keys, those that are real: a prefix if that is all."""
    padding = None if bool(is_real.all()) else is_real
    if seen_lengths.shape == is_real.shape and is_real.numel():
        own = torch.arange(1, is_real.shape[1] + 1, device=is_real.device)
        prefix_lengths = seen_lengths.where(seen_lengths > own, 0).amax(dim=1)
        expected = torch.maximum(own, prefix_lengths.unsqueeze(1))
        if bool(((seen_lengths == expected) | ~is_real).all()):
            return Seen(padding, True, prefix_lengths=prefix_lengths)
    return Seen(padding, False, seen_lengths=seen_lengths)
