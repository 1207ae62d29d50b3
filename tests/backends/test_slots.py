"""Slots hold the remembered keys and the new tokens, each once and in order."""

import pytest
import torch
from cases import inputs

from performers import SoftmaxFeatures, favor_attention
from performers.backends.slots import Slots
from performers.state import NearField

NEAR = NearField(3, num_sinks=2)


@pytest.mark.parametrize("before", [0, 2, 3, 7, 9])
@pytest.mark.parametrize("shown", [[1, 1, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0]])
def test_slots_are_the_last_blocks_and_the_new_tokens(before, shown):
    length, shown = before + 5, torch.tensor([shown]).bool()
    query, key, value = inputs(length, batch=1, key_heads=6)
    first, rest = ([x[:, :, place] for x in (query, key, value)] for place in (
        slice(before), slice(before, length)
    ))  # fmt: skip
    _, state = favor_attention(
        *first, SoftmaxFeatures(5, 7), True, return_state=True, window_size=3, num_sinks=2
    )
    slots = Slots.of(NEAR, rest[0].unsqueeze(2), *rest[1:], shown, state.near)
    assert slots.is_real[0, -1]  # none stands behind the last new token
    real = torch.cat([torch.ones(before, dtype=torch.bool), shown[0]])
    keys, count = key[0][:, real], int(real.sum())
    start = (before // 3 - 1) * 3
    assert (slots.start.item(), slots.count.item()) == (start, count)
    positions = slots.positions()[slots.is_real]
    assert positions.tolist() == list(range(max(0, start), count))
    assert torch.equal(slots.key[0][:, slots.is_real[0]], keys[:, max(0, start) :])
    assert slots.next_start().item() == (count // 3 - 1) * 3
    sink_key, _, is_there = slots.sinks(state.near)
    number = min(2, count)
    assert is_there[0].tolist() == [True] * number + [False] * (2 - number)
    assert torch.equal(sink_key[0][:, :number], keys[:, :number])
    rows = slots.positions()[:, None, None, :, None].expand(1, 6, 1, -1, 1).float()
    of_tokens = slots.tokens(rows)[0, 0, 0, :, 0]
    assert of_tokens[shown[0]].tolist() == list(range(before, count))
    assert not of_tokens[~shown[0]].any()


def test_slots_are_as_many_as_the_longest_of_a_batch_needs():
    query, key, value = inputs(9, batch=2, key_heads=6)
    first, rest = ([x[:, :, place] for x in (query, key, value)] for place in (
        slice(4), slice(4, 9)
    ))  # fmt: skip
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    _, state = favor_attention(
        *first, SoftmaxFeatures(5, 7), True, mask, return_state=True, window_size=3, num_sinks=2
    )
    # The second begins with an empty block and two keys.
    for shown, number in ([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], 5 + 4), ([[0] * 5] * 2, 5 + 1):
        shown = torch.tensor(shown).bool()
        slots = Slots.of(NEAR, rest[0].unsqueeze(2), *rest[1:], shown, state.near)
        assert slots.key.shape[2] == number
        of_tokens = slots.tokens(torch.ones(2, 6, 1, number, 1))[:, 0, 0, :, 0]
        assert torch.equal(of_tokens > 0, shown)


def test_no_sinks_are_no_part_of_a_gradient():
    query, key, value = inputs(7, batch=1, key_heads=6)
    key.requires_grad_()
    slots = Slots.of(NearField(3), query.unsqueeze(2), key, value, None, None)
    found, *_ = slots.sinks(None)
    assert found.shape == (1, 6, 0, key.shape[-1])
    assert not found.requires_grad
