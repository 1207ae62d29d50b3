"""Counted operations are those of the products that make an output, one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from performers.theory.cost import cheaper_from, exact_operations, favor_operations, near_pairs


def test_exact_and_linear_attention_cost_their_products():
    length, dim, m = 37, 11, 23
    query, key, value = torch.randn(3, length, dim).unbind()
    omega = torch.randn(m, dim)
    with FlopCounterMode(display=False) as exact:
        (query @ key.T).softmax(dim=-1) @ value
    with FlopCounterMode(display=False) as linear:
        (query @ omega.T) @ ((key @ omega.T).T @ value)
    with FlopCounterMode(display=False) as maps:
        query @ torch.randn(dim, dim), key @ torch.randn(dim, dim)
    assert exact_operations(length, dim) == exact.get_total_flops()
    assert exact_operations(length, dim, is_causal=True) == exact.get_total_flops() / 2
    plain = favor_operations(length, dim, m)
    assert plain == linear.get_total_flops()
    sharp = favor_operations(length, dim, m, is_sharp=True)
    assert sharp - plain == maps.get_total_flops()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(37, 5), (35, 5), (7, 11), (13, 13), (19, 11)])
def test_near_pairs_are_those_of_a_block_and_its_neighbors(length, window, is_causal):
    block = torch.arange(length) // window
    behind = block[:, None] - block
    is_near = (behind >= 0) & (behind <= 1) if is_causal else behind.abs() <= 1
    assert near_pairs(length, window, is_causal) == int(is_near.sum())


def test_a_near_field_costs_its_pairs_its_sinks_and_the_merging_of_its_blocks():
    length, dim, m, window, sinks = 37, 11, 23, 5, 3
    alone = favor_operations(length, dim, 0, window, sinks, is_sharp=True)
    assert alone == 4 * dim * (near_pairs(length, window) + sinks * length)
    merged = (
        favor_operations(length, dim, m, window, sinks) - alone - favor_operations(length, dim, m)
    )
    assert merged == pytest.approx(2 * 2 * m * (dim + 1) * length / window)
    one_way = [favor_operations(length, dim, m, window, is_causal=True)]
    one_way.append(favor_operations(length, dim, 0, window, is_causal=True))
    rest = one_way[0] - one_way[1] - favor_operations(length, dim, m)
    assert rest == pytest.approx(merged / 2)


def test_heavy_keys_cost_their_scores_and_values_and_once_more_the_scores_of_what_is_near():
    length, dim, window, sinks, heavy = 37, 11, 5, 3, 7
    alone = favor_operations(length, dim, 0, window, sinks)
    found = favor_operations(length, dim, 0, window, sinks, num_heavy=heavy)
    scores = 2 * dim * (near_pairs(length, window) + sinks * length)
    assert found - alone == 4 * dim * heavy * length + scores


def test_a_window_of_the_whole_length_costs_what_exact_attention_does():
    assert favor_operations(37, 11, 0, 37) == exact_operations(37, 11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("m", "window"), [(29, None), (29, 7), (0, 7)])
def test_a_setting_is_cheaper_from_the_first_length_at_which_it_is(m, window, is_causal):
    setting = (m, window, 3 if window else 0, is_causal, True)
    first = cheaper_from(11, *setting)
    cheaper = [
        favor_operations(length, 11, *setting) < exact_operations(length, 11, is_causal)
        for length in range(1, 2 * first)
    ]
    assert cheaper.index(True) == first - 1
    assert all(cheaper[first - 1 :: 7])
