"""Heavy keys: the far keys that near queries paid most, and what a state knows of them."""

import itertools

import pytest
import torch
from cases import MASKS, inputs
from oracle import attended

from performers import SoftmaxFeatures, favor_attention

PHI = SoftmaxFeatures(5, 3)
FIELD = {"window_size": 3, "num_sinks": 2, "far": False, "num_heavy": 4}


def in_pieces(cuts, tensors, mask, field=FIELD):
    """Outputs of a sequence that comes in pieces, and the last state."""
    outputs, state = [], None
    for start, stop in itertools.pairwise([0, *cuts, tensors[0].shape[2]]):
        piece = [x[:, :, start:stop] for x in tensors]
        out, state = favor_attention(
            *piece, PHI, True, None if mask is None else mask[:, start:stop],
            enable_gqa=True, initial_state=state, return_state=True, **field,
        )  # fmt: skip
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


@pytest.mark.parametrize("cuts", [[], [1, 4], range(1, 7)], ids=["whole", "pieces", "tokens"])
def test_a_key_weighs_what_near_queries_pay_it_on_average(cuts):
    """Queries of 0 pay the same to each key that they see, so a weight is a sum of 1 / number.

    Blocks of two and one sink: query 4 sees the keys 0, 2, 3 and 4. Both query heads pay.
    """
    paid = {0: 1, 1: 1 / 2, 2: 1 / 3, 3: 1 / 4, 4: 1 / 4, 5: 1 / 5, 6: 1 / 4}
    near_queries = {1: (1, 2, 3), 2: (2, 3, 4, 5), 3: (3, 4, 5), 4: (4, 5, 6), 5: (5, 6), 6: (6,)}
    sums = {key: 2 * sum(paid[query] for query in near_queries[key]) for key in near_queries}
    query, key, value = inputs(7, batch=1, heads=2, key_heads=1)
    tensors = [0 * query, key, value]
    place = torch.tensor([1, 2, 3, 6, 7, 8, 9])
    mask = torch.zeros(1, 10, dtype=torch.bool).index_fill(1, place, True)
    padded = [x.new_full((*x.shape[:2], 10, x.shape[3]), 7.0) for x in tensors]
    padded = [whole.index_copy(2, place, x) for whole, x in zip(padded, tensors, strict=True)]
    field = {"window_size": 2, "num_sinks": 1, "far": False, "num_heavy": 5}
    for parts, is_real in ((tensors, None), (padded, mask)):
        near = in_pieces(cuts, parts, is_real, field)[1].near
        # Of the far keys the first is a sink, and each has been seen by all that it is near of.
        weights = [sums[1] / 3, sums[2] / 4, sums[3] / 3, -torch.inf, -torch.inf]
        torch.testing.assert_close(near.heavy_weight[0, 0], torch.tensor(weights))
        assert torch.equal(near.heavy_key[:, :, :3], key[:, :, 1:4])
        assert torch.equal(near.heavy_value[:, :, :3], value[:, :, 1:4])
        of_near = torch.tensor([sums[4], sums[5], sums[6], 0.0])
        torch.testing.assert_close(near.heavy_sums[0, 0], of_near)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_block_attends_to_its_heaviest_far_keys(is_causal):
    """As the definition, gradients included; with few far keys, and with none."""
    for name in ("left", "full"):
        tensors, mask = [x.requires_grad_() for x in inputs(dtype=torch.float64)], MASKS[name](23)
        out = favor_attention(*tensors, PHI, is_causal, mask, enable_gqa=True, **FIELD)
        expected = attended(*tensors, PHI, is_causal, mask, **FIELD).out
        torch.testing.assert_close(out, expected)
        cotangent = torch.randn_like(out)
        found = torch.autograd.grad(out, tensors, cotangent)
        torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, cotangent))


@pytest.mark.parametrize("mask", ["no mask", "holes"])
def test_tokens_that_come_one_by_one_attend_to_the_heaviest_far_keys(mask):
    mask = MASKS[mask](23)
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
    expected = attended(*tensors, PHI, True, mask, **FIELD).out
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, tensors, cotangent)
    for cuts in (range(1, 23), [10, 16]):
        out, _ = in_pieces(cuts, tensors, mask)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, tensors, cotangent), gradients)


def test_heavy_keys_of_half_precision_are_exact_keys_of_a_state():
    """What continues from one is rounded like the whole."""
    tensors = inputs(dtype=torch.bfloat16)
    whole = favor_attention(*tensors, PHI, True, enable_gqa=True, **FIELD)
    for cuts in ([14], range(14, 23)):
        out, state = in_pieces(cuts, tensors, None)
        assert state.near.heavy_key.dtype == torch.bfloat16
        torch.testing.assert_close(out, whole, rtol=0.01, atol=1e-3)
