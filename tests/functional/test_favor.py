"""What `favor_attention` adds to linear attention: features that learn from the call."""

import pytest
import torch
from cases import MASKS, inputs

from performers import SharpFeatures, SoftmaxFeatures, favor_attention


@pytest.mark.parametrize("mask", MASKS)
def test_features_of_the_call_learn_from_the_keys_that_are_not_sinks(mask):
    query, key, value = inputs(key_heads=6)
    mask = MASKS[mask](23)
    phi = SharpFeatures(5, 11, 6, "call")
    real = torch.ones(2, 23, dtype=torch.bool) if mask is None else mask
    later = real & (real.cumsum(dim=1) >= 3)  # the first two real keys are the sinks

    def attend(phi):
        return favor_attention(
            query, key, value, phi, key_padding_mask=mask, window_size=3, num_sinks=2
        )

    fitted = phi.fitted(query, key, later, scale=5**-0.5, is_streaming=False)
    torch.testing.assert_close(attend(phi), attend(fitted))
    with_sinks = phi.fitted(query, key, mask, scale=5**-0.5, is_streaming=False)
    assert not torch.allclose(attend(phi), attend(with_sinks))


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_the_far_field_attention_is_softmax_over_near_keys_and_sinks(is_causal):
    query, key, value = inputs(key_heads=6)
    out = favor_attention(
        query, key, value, SoftmaxFeatures(5, 11), is_causal, window_size=3, num_sinks=2, far=False
    )
    position = torch.arange(23)
    is_near = ((position[:, None] // 3 - position // 3).abs() <= 1) | (position < 2)
    if is_causal:
        is_near = is_near.tril()
    scores = (query @ key.mT / 5**0.5).masked_fill(~is_near, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(dim=-1) @ value)
