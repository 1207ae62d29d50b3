"""What a conversion chooses: of what is about as close to the exact model, the cheapest."""

import copy
import dataclasses

import pytest
import torch
from tiny_models import WORDS, bert, llama

from performers import FavorOptions, calibrate, linearize
from performers.convert import exact_copy, measure_fidelity
from performers.convert.fidelity import Fidelity
from performers.convert.linearize import converted_layers
from performers.theory import exact_operations, favor_operations
from performers.train import conversion_choices
from performers.train.conversion_choices import FAR_FIELDS, Chooser, Size

OPTIONS = FavorOptions(11, window_size=5, num_sinks=1)
SIZE = Size(length=41, dim=8, is_causal=False)


def chooser(model, size=SIZE, report=lambda line: None):
    batches = [{"input_ids": torch.randint(5, WORDS, (2, 41))} for _ in range(2)]
    teacher = exact_copy(linearize(copy.deepcopy(model), OPTIONS))
    return Chooser(model, teacher, batches, batches[:1], size, report)


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ((0.3, 0.29, 0.29, 0.2901), "left out"),
        ((0.3, 0.2, 0.28, 0.195), "heavy keys"),
        ((0.3, 0.3, 0.2, 0.1), "estimated, limited"),
        ((0.0, -1e-9, 0.2, 0.1), "left out"),
    ],
)
def test_the_cheapest_of_what_is_about_as_close_as_the_closest_is_taken(
    distances, expected, monkeypatch
):
    found = {name: Fidelity(x) for name, x in zip(FAR_FIELDS, distances, strict=True)}
    monkeypatch.setattr(conversion_choices, "compare_fidelity", lambda *arguments: found)
    lines, options = [], dataclasses.replace(OPTIONS, num_projections=257)  # dearer than heavy keys
    chosen, candidates = chooser(bert(), report=lines.append).far_field(options, False)
    assert chosen == expected
    assert candidates[chosen].options == dataclasses.replace(options, **FAR_FIELDS[expected])
    assert lines[-1] == f"chosen: far keys {expected}"


@pytest.mark.parametrize("build", [bert, llama])
def test_candidates_are_what_each_setting_makes_of_the_model(build):
    model = build()
    before = copy.deepcopy(model.state_dict())
    choose = chooser(model, dataclasses.replace(SIZE, is_causal=build is llama))
    _, found = choose.far_field(OPTIONS, True)
    assert found.keys() >= FAR_FIELDS.keys()
    assert len({one.fidelity.distance for one in found.values()}) == len(found)
    for one in found.values():
        alone = linearize(copy.deepcopy(model), one.options)
        if one.options.far is not False:
            calibrate(alone, choose.learn_from)
        expected = measure_fidelity(alone, choose.teacher, choose.batches).distance
        assert one.fidelity.distance == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_candidates_share_the_weights_and_what_was_learned(monkeypatch):
    learned = []

    def watched(*arguments):
        learned.append(arguments)
        return calibrate(*arguments)

    monkeypatch.setattr(conversion_choices, "calibrate", watched)
    model = bert()
    _, found = chooser(model).far_field(OPTIONS, False)
    assert len(learned) == 1
    places = [{x.data_ptr() for x in one.model.parameters()} for one in found.values()]
    assert all(one == places[0] for one in places)
    free, limited = (
        [dict(layer.feature_map.named_buffers()) for layer in converted_layers(one).values()]
        for one in (found["estimated"].model, found["estimated, limited"].model)
    )
    for ours, theirs in zip(free, limited, strict=True):
        assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [300, 512, 4099])
def test_larger_blocks_are_the_largest_at_the_cost_of_the_estimate(length, is_causal):
    size, options = Size(length, 32, is_causal), FavorOptions(64, window_size=64, num_sinks=4)

    def operations(window, m):
        return favor_operations(length, 32, m, window, 4, is_causal, is_sharp=True)

    found = size.larger_blocks(options)
    assert (found.far, found.num_sinks) == (False, 4)
    allowed = operations(64, 64)
    assert operations(found.window_size, 0) <= allowed
    larger = found.window_size + 16
    assert 2 * larger >= length or operations(larger, 0) > allowed
    assert size.cost(found) == operations(found.window_size, 0) / exact_operations(
        length, 32, is_causal
    )


def test_there_are_no_larger_blocks_where_the_estimate_is_cheaper_than_one_or_blocks_too_few():
    options = FavorOptions(1, "positive", window_size=128)
    assert Size(512, 32, False).larger_blocks(options) is None
    assert Size(271, 32, False).larger_blocks(FavorOptions(64, window_size=128)) is None


def test_without_the_dim_of_heads_settings_are_tried_in_their_order_and_no_cost_is_said():
    lines = []
    _, found = chooser(bert(), None, lines.append).far_field(OPTIONS, True)
    assert found.keys() == FAR_FIELDS.keys()
    assert all(one.cost is None for one in found.values())
    assert not any("operations" in line for line in lines)
