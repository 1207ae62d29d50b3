"""What the experiments of Figures 5 and 14 are said to show is what the committed numbers say."""

import json

import pytest

from performers.reproduction.protocol import EXPERIMENTS


def results(name):
    return json.loads((EXPERIMENTS / name / "reduced.json").read_text("utf-8"))["results"]


@pytest.fixture(scope="module")
def accuracies():
    """Of every curve of Figure 5, left: the accuracies, the one at step 0 first."""
    curves = results("figure-5-left")["curves"]
    return {name: [accuracy for _, accuracy, _ in curve] for name, curve in curves.items()}


@pytest.mark.parametrize("name", ["FAVOR+", "FAVOR+ with a window"])
def test_figure_5_weights_are_above_chance_and_below_exact_before_training(accuracies, name):
    baseline = results("figure-5-left")["baseline"]
    assert baseline < accuracies[name][0] < accuracies["Transformer"][-1]


def test_figure_5_an_exact_near_field_recovers_within_a_tenth_of_the_steps(accuracies):
    assert accuracies["FAVOR+ with a window"][-1] > accuracies["Transformer"][-1] - 0.01


def test_figure_5_plain_features_do_not_at_this_scale(accuracies):
    first, *_, last = accuracies["FAVOR+"]
    assert first < last < accuracies["Transformer"][-1] - 0.01


def test_figure_14_errors_come_through_the_layers():
    for title, panel in results("figure-14")["panels"].items():
        end = [draw[-1] for draw in panel["propagated"]["FAVOR+"]]
        alone = [draw[-1] for draw in panel["one layer alone"]]
        assert sum(end) > 5 * sum(alone)
        if title != "random weights, deviation 1/√d":
            assert sum(end) > 2 * sum(draw[0] for draw in panel["propagated"]["FAVOR+"])
