"""Pathfinder: who follows the dashes from one dot finds the label."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from performers.data.pathfinder import (
    PATH_X,
    PATHFINDER,
    Pathfinder,
    draw_image,
    draw_pathfinder,
)

# Snakes so far apart that one can be followed without knowing where it was drawn.
CLEAR = Pathfinder(
    size=61, num_dashes=5, num_distractors=3, distractor_dashes=2, dash=4.0, clearance=5.5
)
EASY = replace(PATHFINDER, num_dashes=6, num_distractors=10, distractor_dashes=2)
SHORT = replace(
    PATHFINDER, size=8, num_dashes=2, num_distractors=1, distractor_dashes=1, dot_radius=1.0
)


def follows(image):
    """Whether both dots are reached from one of them by steps over gaps of at most two pixels."""
    is_dot, is_bright = image > 200, image > 60
    reached = torch.zeros_like(is_dot)
    reached[tuple(is_dot.nonzero()[0])] = True
    while True:
        near = F.max_pool2d(reached[None].float(), 5, stride=1, padding=2)[0] > 0
        further = near & is_bright
        if torch.equal(further, reached):
            return bool(reached[is_dot].all())
        reached = further


def test_following_the_dashes_from_one_dot_tells_the_label():
    drawn = draw_pathfinder(23, CLEAR, seed=5)
    images = drawn.tokens.reshape(-1, CLEAR.size, CLEAR.size)
    assert [follows(image) for image in images] == drawn.labels.bool().tolist()


@pytest.mark.parametrize(
    "options", [EASY, CLEAR, PATH_X, SHORT], ids=["easy", "clear", "path-x", "short"]
)
@pytest.mark.parametrize("is_connected", [True, False])
def test_snakes_are_dashes_that_turn_a_little_and_keep_clear_of_each_other(options, is_connected):
    drawing = draw_image(is_connected, options, np.random.default_rng(7))
    lengths = [len(snake) // 2 for snake in drawing.snakes]
    assert lengths[:2] == [options.num_dashes] * 2
    assert lengths[2:] == [options.distractor_dashes] * options.num_distractors
    for snake in drawing.snakes:
        points = np.array(snake)
        ways = points[1::2] - points[::2]
        np.testing.assert_allclose(np.abs(ways), options.dash)
        np.testing.assert_allclose(np.abs(points[2::2] - points[1:-1:2]), options.gap)
        assert np.abs(np.angle(ways[1:] / ways[:-1])).max(initial=0) <= options.max_turn + 1e-9
        for coordinate in (points.real, points.imag):
            assert coordinate.min() >= options.dot_radius
            assert coordinate.max() <= options.size - options.dot_radius
    cell = 0.25 * 2**0.5
    for one, other in itertools.combinations(map(np.array, drawing.snakes), 2):
        assert np.abs(one[:, None] - other).min() > options.clearance - cell


@pytest.mark.parametrize("seed", range(5))
def test_dots_are_at_the_ends_of_one_snake_or_of_two(seed):
    joined = draw_image(True, EASY, np.random.default_rng(seed))
    apart = draw_image(False, EASY, np.random.default_rng(seed))
    assert joined.snakes == apart.snakes
    assert joined.dots == (joined.snakes[0][0], joined.snakes[0][-1])
    first, second = apart.dots
    assert first in {apart.snakes[0][0], apart.snakes[0][-1]}
    assert second in {apart.snakes[1][0], apart.snakes[1][-1]}


def test_half_of_the_images_are_connected_and_a_seed_draws_them_again():
    one, again, other = (draw_pathfinder(6, EASY, seed) for seed in (0, 0, 1))
    assert one.tokens.shape == (6, 32 * 32)
    assert one.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert torch.equal(one.tokens, again.tokens)
    assert not torch.equal(one.tokens, other.tokens)


def test_the_benchmark_has_32_pixels_a_side_and_path_x_128():
    assert draw_pathfinder(1).tokens.shape == (1, 32 * 32)
    assert draw_pathfinder(1, PATH_X).tokens.shape == (1, 128 * 128)


@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match=r"no room for 48 dashes on 3 × 3 pixels"):
        draw_pathfinder(1, Pathfinder(size=3))
    with pytest.raises(ValueError, match=r"below dash \+ 2 · gap = 4, got 4"):
        Pathfinder(clearance=4.0)
