"""Masked keys are as if they were not there, whatever they hold."""

import pytest
import torch
from cases import (
    FEATURE_MAPS,
    MASKS,
    backends,
    every_call_of,
    every_call_with_maps_of,
    inputs,
)

from performers import favor_attention, softmax_attention

CAUSAL = (False, True)


@every_call_with_maps_of(FEATURE_MAPS)
@pytest.mark.parametrize("mask", ["left", "right", "holes", "full"])
def test_padding_may_hold_anything(mask, is_causal, backend, names):
    query, key, value = inputs()
    mask = MASKS[mask](23)
    padding = torch.tensor([float("nan"), float("inf"), 1e30]).repeat(8)[:23, None]
    dirty = [torch.where(mask[:, None, :, None], x, padding) for x in (key, value)]
    for name in names:
        phi = FEATURE_MAPS[name](5, 11)
        arguments = (phi, is_causal, mask)
        clean = favor_attention(query, key, value, *arguments, enable_gqa=True, backend=backend)
        out = favor_attention(query, *dirty, *arguments, enable_gqa=True, backend=backend)
        assert torch.equal(out, clean), name


@every_call_of(FEATURE_MAPS)
def test_masking_keys_is_leaving_them_out(is_causal, name, backend):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs()
    visible = MASKS["holes"](23)[0]
    mask = visible.expand(2, -1)
    out = favor_attention(query, key, value, phi, is_causal, mask, enable_gqa=True, backend=backend)
    kept = [x[:, :, visible] for x in (query, key, value)]
    without = favor_attention(*kept, phi, is_causal, enable_gqa=True, backend=backend)
    torch.testing.assert_close(out[:, :, visible], without, rtol=1e-3, atol=1e-4)


@every_call_of(FEATURE_MAPS)
def test_a_row_that_sees_no_key_is_zero_with_zero_gradients(name, is_causal, backend):
    phi = FEATURE_MAPS[name](5, 11)
    tensors = [x.requires_grad_() for x in inputs()]
    mask = MASKS["full"](23)  # the first batch row sees nothing
    out = favor_attention(*tensors, phi, is_causal, mask, enable_gqa=True, backend=backend)
    assert out[0].eq(0).all()
    assert out[1].ne(0).any()
    out.square().sum().backward()
    for x in tensors:
        assert x.grad.isfinite().all()
        assert x.grad[0].eq(0).all()


@pytest.mark.parametrize("backend", backends(is_causal=True))
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_left_padding_shifts_a_causal_sequence(name, backend):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs(key_heads=6)
    mask = torch.arange(23).expand(2, -1) >= 12
    padded = favor_attention(query, key, value, phi, True, mask, backend=backend)
    alone = [x[:, :, 12:] for x in (query, key, value)]
    expected = favor_attention(*alone, phi, True, backend=backend)
    torch.testing.assert_close(padded[:, :, 12:], expected, rtol=1e-3, atol=1e-4)
    assert padded[:, :, :12].eq(0).all()


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("mask", MASKS)
def test_exact_attention_follows_the_same_masks_at_any_scale(mask, is_causal):
    query, key, value = inputs()
    mask = MASKS[mask](23)
    scores = torch.einsum("bhid,bhjd->bhij", query, key.repeat_interleave(2, 1)).double()
    visible = torch.ones(23, 23, dtype=torch.bool)
    visible = visible.tril() if is_causal else visible
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    scores = scores.masked_fill(~visible, -torch.inf)
    for scale, factor in ((None, 5**-0.5), (0.3, 0.3), (2.0, 2.0)):
        out = softmax_attention(query, key, value, is_causal, mask, scale, enable_gqa=True)
        weights = (factor * scores).softmax(dim=-1).nan_to_num(0.0)
        expected = weights @ value.repeat_interleave(2, 1).double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
