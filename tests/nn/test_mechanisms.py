"""`Favor` and `Exact` are the functions of their names, as modules."""

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, inputs

from performers import LinearState, favor_attention, softmax_attention
from performers.nn import Exact, Favor
from performers.typing import is_log_linear

FAVOR = [
    (name, window_size)
    for name, build in FEATURE_MAPS.items()
    for window_size in (None, 3)
    if window_size is None or is_log_linear(build(5, 2))
]
both_ways = pytest.mark.parametrize("is_causal", [False, True])


@both_ways
@pytest.mark.parametrize(("name", "window_size"), FAVOR)
def test_favor_is_favor_attention_with_its_features_and_its_window(name, window_size, is_causal):
    tensors, phi = inputs(), FEATURE_MAPS[name](5, 11)
    options = {"is_causal": is_causal, "key_padding_mask": MASKS["holes"](23)}
    expected = favor_attention(*tensors, phi, enable_gqa=True, window_size=window_size, **options)
    found = Favor(phi, window_size)(*tensors, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("name", "window_size"), FAVOR)
def test_resuming_goes_on_where_the_state_ends(name, window_size):
    tensors, mask = inputs(), MASKS["holes"](23)
    favor = Favor(FEATURE_MAPS[name](5, 11), window_size)
    whole = favor(*tensors, is_causal=True, key_padding_mask=mask)
    first, rest = (
        [x[:, :, place] for x in tensors] + [mask[:, place]] for place in (slice(9), slice(9, 23))
    )
    out, state = favor.resume(*first, None)
    assert isinstance(state, LinearState)
    more, _ = favor.resume(*rest, state)
    torch.testing.assert_close(torch.cat([out, more], dim=2), whole, rtol=1e-4, atol=1e-5)


@both_ways
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("key_heads", [3, 6])
def test_exact_is_softmax_attention(key_heads, mask, is_causal):
    tensors = inputs(key_heads=key_heads)
    options = {"is_causal": is_causal, "key_padding_mask": MASKS[mask](23)}
    expected = softmax_attention(*tensors, enable_gqa=True, **options)
    torch.testing.assert_close(Exact()(*tensors, **options), expected)


def test_as_many_positions_as_heads_are_not_taken_for_heads():
    tensors = inputs(3, key_length=6, heads=6, key_heads=3)
    expected = softmax_attention(*tensors, enable_gqa=True)
    torch.testing.assert_close(Exact()(*tensors), expected)
