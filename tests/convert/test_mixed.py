"""Of a model converted in part, the layers that stay exact are those that cost it most."""

import copy

import pytest
import torch
from tiny_models import MODELS, bert, inputs_for, llama, outputs_of

from performers import FavorOptions, calibrate, linearize, restore
from performers.convert.linearize import converted_layers
from performers.convert.mixed import choose_layers, layer_costs

SMALL = {"num_projections": 17, "window_size": 3, "num_sinks": 0}


@pytest.mark.parametrize("name", MODELS)
def test_the_cost_of_a_layer_is_the_error_of_a_model_with_that_layer_converted(name):
    exact = MODELS[name]()
    batches = [inputs_for(exact), inputs_for(exact, 19)]
    costs = layer_costs(linearize(copy.deepcopy(exact), FavorOptions(**SMALL)), batches)
    assert list(costs) == [0, 1]
    exact.requires_grad_(False)
    states = [outputs_of(exact.base_model, batch) for batch in batches]
    for number, cost in costs.items():
        linearize(exact, FavorOptions(**SMALL, layers=[number]))
        found = [outputs_of(exact.base_model, batch) for batch in batches]
        wrong = sum((x - y).square().sum() for x, y in zip(found, states, strict=True))
        error = (wrong / sum(x.square().sum() for x in states)).sqrt()
        assert cost == pytest.approx(float(error), rel=1e-4)
        assert cost > 0.01


def test_measuring_costs_leaves_the_model_as_it_was():
    model = linearize(bert(), FavorOptions(**SMALL))
    inputs = inputs_for(model)
    calibrate(model, [inputs])
    expected, layers = outputs_of(model, inputs), converted_layers(model)
    costs = layer_costs(model, [inputs])
    assert layer_costs(model.train(), [inputs]) == costs  # without dropout
    assert all(module.training for module in model.modules())
    assert converted_layers(model) == layers
    assert torch.equal(outputs_of(model.eval(), inputs), expected)


def test_a_model_is_measured_as_it_was_calibrated():
    model = linearize(llama(), FavorOptions(**SMALL))
    inputs = inputs_for(model)
    before = layer_costs(model, [inputs])
    after = layer_costs(calibrate(model, [inputs]), [inputs])
    assert all(after[number] != before[number] for number in before)


def test_the_layers_that_cost_most_stay_exact():
    costs = {0: 0.3, 2: 0.7, 5: 0.1, 7: 0.7}
    assert choose_layers(costs, num_exact=1) == (0, 5, 7)
    assert choose_layers(costs, num_exact=2) == (0, 5)
    assert choose_layers(costs, num_exact=3) == (5,)


def test_a_window_of_the_whole_length_costs_nothing():
    model = linearize(bert(), FavorOptions(num_projections=17, window_size=13, num_sinks=0))
    assert all(cost < 1e-5 for cost in layer_costs(model, [inputs_for(model)]).values())


@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_chosen_is_refused():
    model = linearize(bert(), FavorOptions(**SMALL))
    inputs = inputs_for(model)
    with pytest.raises(ValueError, match="at least one batch of inputs, got none"):
        layer_costs(model, [])
    with pytest.raises(ValueError, match=r"this model is exact\. Convert it with performers\.lin"):
        layer_costs(restore(model), [inputs])
    with pytest.raises(ValueError, match="must leave a layer to convert: there are 2, and 2 would"):
        choose_layers({0: 0.3, 1: 0.1}, num_exact=2)
    with pytest.raises(ValueError, match="num_exact must be a whole number of at least 1"):
        choose_layers({0: 0.3, 1: 0.1}, num_exact=0)
