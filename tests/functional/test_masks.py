"""A mask of pairs is read as padding and causality, or it is said which pair is in the way."""

import pytest
import torch

from performers.functional.masks import HIDING, Seen, is_hidden, keys_of_pairs

KEYS = 7
PADDING = torch.tensor([[True] * KEYS, [False, False, *[True] * (KEYS - 2)]])


def pairs(is_real, is_causal, query_length=KEYS):
    """Who sees whom, (batch, 1, query_length, KEYS); the queries are the last of the sequence."""
    visible = is_real[:, None, None, :].expand(-1, 1, KEYS, -1)
    return (visible.tril() if is_causal else visible)[:, :, KEYS - query_length :].clone()


def same(found, padding, is_causal):
    assert isinstance(found, Seen), found
    mask = found.key_padding_mask
    assert (mask is None) if padding is None else torch.equal(mask, padding)
    assert found.is_causal is is_causal


def test_what_hides_is_at_the_limit_or_below():
    below = torch.nextafter(torch.tensor(HIDING), torch.tensor(-torch.inf))
    assert is_hidden(torch.tensor([0.0, HIDING])).tolist() == [False, True]
    assert is_hidden(torch.stack([below, torch.tensor(0.0)])).tolist() == [True, False]
    assert is_hidden(torch.tensor([0.0, HIDING / 2])) is None
    assert is_hidden(torch.tensor([0.0, HIDING]).requires_grad_()) is None


@pytest.mark.parametrize("prefers_causal", [False, True])
@pytest.mark.parametrize("query_length", [2, KEYS])
@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_and_causality_are_read_whichever_is_tried_first(
    is_causal, query_length, prefers_causal
):
    everything = torch.ones_like(PADDING)
    for is_real, padding in ((everything, None), (PADDING, PADDING)):
        visible = pairs(is_real, is_causal, query_length)
        same(keys_of_pairs(visible, prefers_causal=prefers_causal), padding, is_causal)


@pytest.mark.parametrize("prefers_causal", [False, True])
def test_one_query_that_sees_everything_is_read_as_it_is_preferred(prefers_causal):
    visible = pairs(PADDING, is_causal=True, query_length=1)
    same(keys_of_pairs(visible, prefers_causal=prefers_causal), PADDING, prefers_causal)


def test_a_padded_query_may_see_nothing_and_a_real_one_may_not():
    visible = pairs(PADDING, is_causal=False)
    visible[1, :, :2] = False
    same(keys_of_pairs(visible, prefers_causal=False), PADDING, False)
    visible[1, :, 4] = False
    found = keys_of_pairs(visible, prefers_causal=False)
    assert found == "it is not padding: of sequence 1, query 4 does not see key 2"


def test_the_pair_in_the_way_is_named_under_the_reading_that_explains_more():
    visible = pairs(torch.ones_like(PADDING), is_causal=True)
    visible[1, 0, 2, 5] = True
    for prefers_causal in (False, True):
        found = keys_of_pairs(visible, prefers_causal=prefers_causal)
        assert found == "it is not causality and padding: of sequence 1, query 2 sees key 5"


def test_heads_must_see_the_same():
    visible = pairs(PADDING, is_causal=True).repeat(1, 3, 1, 1)
    same(keys_of_pairs(visible, prefers_causal=True), PADDING, True)
    visible[0, 2, 5, 1] = False
    assert keys_of_pairs(visible, prefers_causal=True) == "it differs between heads"


LENGTHS = torch.arange(1, KEYS + 1)


def of_lengths(lengths, is_real=PADDING):
    """Who sees whom where each query sees the first so many keys, those that are real."""
    return (torch.arange(KEYS) < lengths[..., None]).expand(2, -1, -1)[:, None] & is_real[
        :, None, None
    ]


@pytest.mark.parametrize("prefers_causal", [False, True])
def test_a_prefix_is_read(prefers_causal):
    prefixes = torch.tensor([3, 5])
    visible = of_lengths(torch.maximum(LENGTHS, prefixes[:, None]))
    for free in (False, True):
        if free:
            visible[1, :, :2] = False  # padded queries
        found = keys_of_pairs(visible, prefers_causal=prefers_causal)
        same(found, PADDING, True)
        assert torch.equal(found.prefix_lengths, prefixes)


@pytest.mark.parametrize("query_length", [3, KEYS])
def test_chunks_are_read(query_length):
    lengths = ((torch.arange(query_length) // 2 + 1) * 2).clamp(max=KEYS)
    visible = of_lengths(lengths)
    found = keys_of_pairs(visible, prefers_causal=True)
    assert not found.is_causal
    # A key that no query sees may count as padding.
    assert torch.equal(of_lengths(found.seen_lengths, found.key_padding_mask), visible)


def test_lengths_that_fall_are_no_staircase():
    lengths = LENGTHS.flip(0)
    found = keys_of_pairs(of_lengths(lengths), prefers_causal=True)
    assert found.startswith("it is not ")
