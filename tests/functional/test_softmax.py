"""Exact attention is its formula, with every mask and scale."""

import pytest
import torch
from cases import MASKS, inputs

from performers import softmax_attention


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_exact_attention_is_softmax_of_scaled_scores_over_the_visible_keys(mask, is_causal, scale):
    query, key, value = inputs()
    mask = MASKS[mask](23)
    out = softmax_attention(query, key, value, is_causal, mask, scale, enable_gqa=True)
    visible = torch.ones(2, 1, 23, 23, dtype=torch.bool)
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    if is_causal:
        visible = visible.tril()
    scores = query @ key.repeat_interleave(2, dim=1).mT * (scale or 5**-0.5)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()
    torch.testing.assert_close(out, weights @ value.repeat_interleave(2, dim=1))
