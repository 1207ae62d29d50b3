"""What an error costs: every setting of the grid is measured, and the cheapest is taken."""

import dataclasses
import json

import pytest
import torch

from performers import SharpFeatures, favor_attention, softmax_attention
from performers.diagnosis import measure_frontier
from performers.diagnosis.captured import Captured
from performers.theory import exact_operations

DIM, LENGTH = 8, 131


def captured(is_causal=False, length=LENGTH, batch=2):
    query = torch.randn(batch, 4, length, DIM) * 2
    key, value = torch.randn(2, batch, 2, length, DIM).unbind()
    return Captured("layer", query, key, value, scale=0.3, is_causal=is_causal)


def relative_error(out, layer, part=slice(None)):
    exact = softmax_attention(
        layer.query[part], layer.key[part], layer.value[part], layer.is_causal, None, layer.scale,
        enable_gqa=True,
    )  # fmt: skip
    return ((out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)).mean()


@pytest.mark.parametrize("is_causal", [False, True])
def test_errors_are_those_of_attention_with_the_setting(is_causal):
    layer = captured(is_causal)
    part = slice(1, None) if is_causal else slice(None)
    phi = SharpFeatures(DIM, 16, 2, "calibrated" if is_causal else "call")
    if is_causal:
        phi.calibrate(layer.query[:1], layer.key[:1], scale=layer.scale)
    frontier = measure_frontier([layer], num_sinks=0, num_projections=[16], windows=[16])
    found = {(x.window_size, x.num_projections): x for x in frontier.settings}
    for window, m in ((16, 0), (16, 16), (24, 0)):
        out = favor_attention(
            layer.query[part], layer.key[part], layer.value[part], phi, is_causal,
            scale=layer.scale, enable_gqa=True, window_size=window, far=m > 0,
        )  # fmt: skip
        expected = relative_error(out, layer, part)
        torch.testing.assert_close(torch.tensor(found[window, m].error), expected)


def test_off_the_frontier_something_no_dearer_is_no_worse():
    layers = [captured(), captured(is_causal=True)]
    frontier = measure_frontier(layers)
    settings = frontier.settings
    assert frontier.exact_operations == 0.75 * exact_operations(LENGTH, DIM)
    points = [(x.operations, x.error) for x in settings]
    assert points == sorted(points)
    points += [(0.0, frontier.averaging_error), (frontier.exact_operations, 0.0)]
    for setting in settings:
        beaten = any(
            cost <= setting.operations and error <= setting.error
            for cost, error in points
            if (cost, error) != (setting.operations, setting.error)
        )
        assert setting.is_on_frontier is not beaten
        assert (setting.seconds is not None) is setting.is_on_frontier
    assert any(x.is_on_frontier for x in settings)


def test_the_cheapest_setting_within_an_error_is_taken_and_none_is_made_up():
    frontier = measure_frontier([captured()])
    errors = sorted(x.error for x in frontier.settings)
    wanted = errors[len(errors) // 2]
    chosen = frontier.within(wanted)
    enough = [x for x in frontier.settings if x.error <= wanted]
    assert chosen.operations == min(x.operations for x in enough)
    with pytest.raises(ValueError, match=f"the lowest is {errors[0]:.3f} .* or keep exact"):
        frontier.within(errors[0] / 2)
    with pytest.raises(ValueError, match="error must be positive and finite, got 0"):
        frontier.within(0.0)


def test_it_is_said_where_nothing_is_cheaper_than_exact_attention():
    frontier = measure_frontier([captured(length=40)], 0, windows=[16], num_projections=[64])
    assert frontier.settings[0].num_projections == 0  # which costs less
    frontier = dataclasses.replace(
        frontier,
        settings=tuple(dataclasses.replace(x, is_on_frontier=False) for x in frontier.settings[1:]),
    )
    dear = frontier.settings[0]
    assert dear.operations > frontier.exact_operations
    assert "No setting is cheaper than exact attention at length 40" in str(frontier)
    assert "is cheaper than exact attention at length 40" in frontier.cost(dear)


def test_sinks_are_exact_beside_every_near_field():
    layer = captured()
    layer.key[:, :, 0] *= 8  # where attention goes
    none, one = (measure_frontier([layer], sinks, num_projections=[16]) for sinks in (0, 1))
    before = {(x.window_size, x.num_projections): x for x in none.settings if x.features == "sharp"}
    for setting in one.settings:
        if setting.features == "positive":
            continue
        same = before[setting.window_size, setting.num_projections]
        assert setting.num_sinks == (setting.window_size is not None)
        if setting.window_size is None:
            assert setting == dataclasses.replace(
                same, is_on_frontier=setting.is_on_frontier, seconds=setting.seconds
            )
            continue
        assert setting.error < same.error
        assert setting.operations == same.operations + 4 * DIM * LENGTH


def test_a_frontier_is_a_table_and_json():
    frontier = measure_frontier([captured()], num_projections=[16])
    header, *rows = str(frontier).splitlines()
    assert header.split() == ["error", "near", "alone", "m", "=", "16"]
    assert rows[0].split()[0] == "positive"
    written = json.loads(json.dumps(dataclasses.asdict(frontier)))
    assert len(written["settings"]) == len(frontier.settings)


def test_what_cannot_be_measured_is_refused():
    cross = dataclasses.replace(captured(), query=torch.randn(2, 4, 7, DIM))
    with pytest.raises(ValueError, match="there must be self-attention"):
        measure_frontier([cross])
    with pytest.raises(ValueError, match="none leaves three blocks of 131 positions"):
        measure_frontier([captured()], windows=[128])
    with pytest.raises(ValueError, match="num_projections"):
        measure_frontier([captured()], num_projections=[0])
