"""The tab of costs measures what `measure_frontier` measures, with a bar."""

import re

import pytest

from performers.diagnosis import measure_frontier
from performers.explore import sample_subject
from performers.explore.frontier import compare, grid, one_setting

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV"


@pytest.fixture(scope="module")
def subject():
    return sample_subject()


def numbers(frontier):
    return [
        (x.features, x.window_size, x.num_projections, x.error, x.operations)
        for x in frontier.settings
    ]


def test_the_grid_is_the_frontier_of_the_layers_with_a_bar_that_grows(subject):
    bars, frontiers = zip(*grid(subject, PROTEIN[:27]), strict=True)
    shares = [float(re.search(r'value="([\d.]+)"', bar)[1]) for bar in bars]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert set(frontiers[:-1]) == {None}
    expected = measure_frontier([layer.captured for layer in subject.layers(PROTEIN[:27])])
    assert numbers(frontiers[-1]) == numbers(expected)


@pytest.mark.parametrize(("window", "m"), [(0, 8), (16, 0), (16, 8)])
def test_the_sliders_measure_the_setting_that_they_say(subject, window, m):
    setting, _ = one_setting(subject, PROTEIN, window, m)
    assert (setting.window_size or 0, setting.num_projections) == (window, m)


def test_the_page_says_what_a_setting_costs(subject):
    setting, frontier = one_setting(subject, PROTEIN, 16, 8)
    drawn, sentence = compare(subject, PROTEIN, None, 16, 8)
    assert f"**{setting}**: error {setting.error:.3f}" in sentence
    assert frontier.cost(setting) in sentence
    assert drawn.count("<img") == 1


@pytest.mark.usefixtures("without_shape_checks")
def test_sliders_that_say_nothing_are_refused(subject):
    with pytest.raises(ValueError, match="near field, projections m, or both: got neither"):
        one_setting(subject, PROTEIN, 0, 0)
