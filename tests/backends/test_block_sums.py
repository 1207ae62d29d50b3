"""Sums of blocks, group by group, are what their definition says, there and back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performers.backends.blocks.far import Merge
from performers.backends.fused_softmax import HIDDEN

HEADS, DIM, FEATURES = 2, 3, 5


def problem(count, group, spread, seed, is_causal, is_new):
    """Log-masses and averages of blocks and of a state, some of them without a key."""
    group = min(group, count)
    room = -(-count // group) * group + 2
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_mass = torch.full((HEADS, room, FEATURES), HIDDEN, dtype=torch.float64)
    log_mass[:, :count] = spread * randn(HEADS, count, FEATURES)
    log_mass[:, 1:count:4] = HIDDEN
    blocks = torch.zeros(HEADS, room, DIM, FEATURES, dtype=torch.float64)
    blocks[:, :count] = randn(HEADS, count, DIM, FEATURES)
    first_mass, first = spread * randn(HEADS, FEATURES), randn(HEADS, DIM, FEATURES)
    if is_new:
        first_mass, first = torch.full_like(first_mass, HIDDEN), torch.zeros_like(first)
    return (count, group, is_causal), log_mass, blocks, first_mass, first


def defined(sizes, log_mass, blocks, first_mass, first):
    """F of each block and the average of all, each from its own softmax over what is far."""
    count, _, is_causal = sizes
    masses = torch.cat([first_mass.unsqueeze(1), log_mass[:, :count]], dim=1)
    values = torch.cat([first.unsqueeze(1), blocks[:, :count]], dim=1)
    rows = []
    for block in range(count):
        after = [] if is_causal else range(block + 3, count + 1)
        rows.append([0, *range(1, block), *after])  # block i stands at place i + 1
    averages, logs = [], []
    for places in [*rows, [*range(count + 1)]]:
        weights = masses[:, places].softmax(dim=1).unsqueeze(2)
        averages.append((weights * values[:, places]).sum(dim=1))
        logs.append(masses[:, places].logsumexp(dim=1))
    return torch.stack(averages, dim=1), torch.stack(logs, dim=1)


def merged(sizes, log_mass, blocks, first_mass, first):
    """The same by `Merge`."""
    far = torch.full_like(blocks, torch.nan)
    count = sizes[0]
    merge = Merge(log_mass, first_mass, *sizes)
    last = merge.far(first, blocks.clone(), far)
    averages = torch.cat([far[:, :count], last.unsqueeze(1)], dim=1)
    logs = torch.cat([merge.log_mass[:, :count], merge.last_mass.unsqueeze(1)], dim=1)
    return merge, averages, logs


SHAPES = {
    "count": st.integers(1, 21),
    "group": st.integers(1, 8),
    "spread": st.sampled_from([1.0, 30.0, 3000.0]),
    "seed": st.integers(0, 99),
    "is_causal": st.booleans(),
    "is_new": st.booleans(),
}


@given(**SHAPES)
def test_averages_of_what_is_far_are_softmaxes_over_blocks(**shape):
    arguments = problem(**shape)
    _, averages, logs = merged(*arguments)
    wanted, wanted_logs = defined(*arguments)
    is_there = wanted_logs > HIDDEN / 2
    torch.testing.assert_close(logs[is_there], wanted_logs[is_there])
    assert bool((logs[~is_there] <= HIDDEN / 2).all())
    is_there = is_there.unsqueeze(2).expand_as(wanted)
    torch.testing.assert_close(averages[is_there], wanted[is_there], rtol=1e-9, atol=1e-9)
    assert bool(averages.isfinite().all())


@given(**SHAPES)
def test_gradients_of_blocks_are_those_of_the_definition(**shape):
    sizes, log_mass, blocks, first_mass, first = problem(**shape)
    leaves = blocks.requires_grad_(), first.requires_grad_()
    wanted, logs = defined(sizes, log_mass, *leaves[:1], first_mass, first)
    generator = torch.Generator().manual_seed(shape["seed"])
    gradient = torch.randn(wanted.shape, generator=generator, dtype=torch.float64)
    gradient[(logs <= HIDDEN / 2).unsqueeze(2).expand_as(gradient)] = 0.0  # nothing is there
    of_blocks, of_first = torch.autograd.grad(wanted, leaves, gradient)
    with torch.no_grad():
        merge, *_ = merged(sizes, log_mass, blocks, first_mass, first)
        of_far, found = torch.zeros_like(blocks), torch.full_like(blocks, torch.nan)
        of_far[:, : sizes[0]] = gradient[:, :-1]
        factor = torch.rand(*log_mass.shape, generator=generator, dtype=torch.float64).unsqueeze(2)
        found_first = merge.far_back(gradient[:, -1], of_far, found, factor)
    found, wanted = found[:, : sizes[0]], (of_blocks * factor)[:, : sizes[0]]
    is_there = (log_mass[:, : sizes[0]] > HIDDEN / 2).unsqueeze(2).expand_as(found)
    torch.testing.assert_close(found[is_there], wanted[is_there], rtol=1e-9, atol=1e-9)
    if not shape["is_new"]:
        torch.testing.assert_close(found_first, of_first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e4])
@pytest.mark.parametrize("count", [5, 19])
def test_no_average_knows_a_block_that_is_not_yet_far(count, value):
    arguments = problem(count, 4, 1.0, 0, True, False)
    _, averages, logs = merged(*arguments)
    for block in range(count):
        _, log_mass, blocks, *_ = arguments = problem(count, 4, 1.0, 0, True, False)
        log_mass[:, block], blocks[:, block] = value, value
        _, other, other_logs = merged(*arguments)
        assert torch.equal(other[:, : block + 2][:, :count], averages[:, : block + 2][:, :count])
        before = slice(min(block + 2, count))
        assert torch.equal(other_logs[:, before], logs[:, before])
