"""Figures of the explorer show the numbers that they are given."""

import numpy as np
import pytest

from performers.viz.diagnosis import frontier_figure
from performers.viz.explorer import estimates_figure, matrices_figure, memory_figure, row_figure

DRAW = np.random.default_rng(0)


def test_the_third_panel_is_the_difference_in_the_view():
    exact, implied = DRAW.random((2, 13, 13))
    figure = matrices_figure(exact, implied, False, 3, 9, picked=5)
    ratio, _, difference = (axes.images[0] for axes in figure.axes[:3])
    np.testing.assert_allclose(difference.get_array(), (implied - exact)[3:10, 3:10])
    np.testing.assert_allclose(ratio.get_array(), 13 * exact[3:10, 3:10])
    assert tuple(difference.get_extent()) == (3.5, 10.5, 10.5, 3.5)


def test_rounding_has_no_color_in_the_difference():
    exact = DRAW.random((13, 13))
    figure = matrices_figure(exact, exact + 1e-7, False, 0, 12, picked=5)
    assert figure.axes[2].images[0].get_clim()[1] == pytest.approx(exact.max() / 1000)


def test_the_future_of_a_causal_matrix_is_left_gray():
    exact = np.tril(DRAW.random((7, 7)))
    figure = matrices_figure(exact, exact, True, 0, 6, picked=0)
    shown = figure.axes[0].images[0].get_array()
    assert (shown.mask == np.triu(np.ones((7, 7), bool), 1)).all()
    np.testing.assert_allclose(shown[4, :5].data, 5 * exact[4, :5])  # row 5 has 5 visible keys


def test_a_row_has_a_bar_for_each_position_in_view_and_its_letter():
    exact, implied = DRAW.random((2, 11))
    (axes,) = row_figure(exact, implied, list("ACDEFGHIKLM"), 2, 8, picked=4).axes
    (bars,) = (patch for patch in axes.patches if patch.get_label() == "implied by the layer")
    np.testing.assert_array_equal(bars.get_data().values, implied[2:9])
    assert bars.get_data().edges.tolist() == [2.5 + position for position in range(8)]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("DEFGHIK")
    assert axes.get_title(loc="left") == "What F at position 5 attends to"


def test_every_estimate_is_in_the_histogram_also_those_beyond_its_edge():
    values = np.append(DRAW.normal(size=997), [1e6, -1e6, 1e6])
    figure = estimates_figure(values, 0.5, 0.5, 1.0, (1.0, 2.0), 30.0)
    counts = sum(patch.get_height() for patch in figure.axes[1].containers[0])
    assert counts == 1000


def test_a_chosen_setting_is_a_star_at_its_cost_and_error():
    setting = {
        "features": "sharp", "window_size": 16, "num_projections": 8, "error": 0.25,
        "operations": 30.0, "is_on_frontier": True,
    }  # fmt: skip
    frontier = {
        "settings": [setting], "length": 64, "averaging_error": 1.0, "exact_operations": 60.0
    }  # fmt: skip
    chosen = {**setting, "error": 0.125, "operations": 15.0}
    lines = frontier_figure(frontier, chosen).axes[0].lines
    (star,) = (line for line in lines if line.get_label() == "chosen")
    assert star.get_xydata().tolist() == [[0.25, 0.125]]
    assert all(line.get_label() != "chosen" for line in frontier_figure(frontier).axes[0].lines)


def test_memory_is_drawn_in_kilobytes():
    (axes,) = memory_figure(
        [1, 2], {"this model": [512.0, 512.0], "keys and values": [256.0, 2048.0]}
    ).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.5, 0.5], [0.25, 2.0]]
    assert axes.get_ylim()[0] == pytest.approx(0)
