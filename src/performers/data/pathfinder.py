"""Pathfinder: whether one dashed line leads from one dot to the other, read pixel by pixel.

    ●                ●
     ╲   ╱ ╲           ╲   ╱ ╲
       ╲     ●               ╲
         ╲                 ● ──
    connected         not connected

Every image has two long snakes and shorter ones to distract. Both dots are at the ends of one long
snake, or at an end of each. A dash by itself says nothing: the line has to be followed.

Source: Linsley et al. 2018, "Learning long-range spatial dependencies with horizontal gated
recurrent units"; Tay et al. 2021, "Long Range Arena", Section 2.2.5, whose Path-X has images of
128 × 128 pixels.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8

from performers.checks import check_count, check_number
from performers.data.labeled import LabeledSequences

__all__ = ["PATHFINDER", "PATH_X", "Drawing", "Pathfinder", "draw_image", "draw_pathfinder"]

# Turns that are tried before the last two dashes are taken back; turns for each dash before the
# snake, snakes before the image is begun again, and images before it is given up.
RETREAT = 5
TURNS = 20
SNAKES = 10
IMAGES = 50

BRIGHTEST = 255
DASHES = 0.75  # their brightness beside that of the dots


@dataclass(frozen=True)
class Pathfinder:
    """How an image is drawn; lengths in pixels.

    `size`: of each side. `num_dashes`: of both long snakes. `num_distractors`: shorter snakes of
    `distractor_dashes`. `max_turn`: between one dash and the next, in radians. `clearance`: between
    the dashes of different snakes.
    """

    size: int = 32
    num_dashes: int = 14
    num_distractors: int = 5
    distractor_dashes: int = 4
    dash: float = 2.0
    gap: float = 1.0
    thickness: float = 1.0
    dot_radius: float = 1.5
    clearance: float = 1.75
    max_turn: float = math.pi / 5

    def __post_init__(self) -> None:
        check_count("size", self.size)
        check_count("num_dashes", self.num_dashes)
        check_count("num_distractors", self.num_distractors, least=0)
        check_count("distractor_dashes", self.distractor_dashes)
        for name in ("dash", "gap", "thickness", "dot_radius", "clearance", "max_turn"):
            check_number(name, getattr(self, name))
        longest = self.dash + 2 * self.gap
        if self.clearance >= longest:
            raise ValueError(
                "a dash must keep clear of the one before the last: clearance must be below dash + "
                f"2 · gap = {longest:g}, got {self.clearance:g}."
            )


# The long contours of Long Range Arena, 14 dashes, and distractors of a third of that.
PATHFINDER = Pathfinder()
PATH_X = replace(
    PATHFINDER, size=128, num_distractors=8, dash=5.0, gap=2.5, thickness=1.5, dot_radius=3.0,
    clearance=4.0,
)  # fmt: skip


@dataclass(frozen=True)
class Drawing:
    """Points are row + column · i: the starts and ends of the dashes of both long snakes and then
    of the others, and the centers of both dots.
    """

    snakes: list[list[complex]]
    dots: tuple[complex, complex]


def draw_pathfinder(
    count: int, options: Pathfinder = PATHFINDER, seed: int = 0
) -> LabeledSequences:
    """Images row by row, as (count, size²) bytes, and whether a snake joins the dots, 1 or 0.

    Every other image is connected. The same seed draws the same images.
    """
    check_count("count", count)
    generator = np.random.default_rng(seed)
    labels = torch.arange(count) % 2
    images = [
        render(draw_image(bool(label), options, generator), options).reshape(-1) for label in labels
    ]
    return LabeledSequences(torch.from_numpy(np.stack(images)), labels)


def draw_image(is_connected: bool, options: Pathfinder, generator: np.random.Generator) -> Drawing:
    """Where snakes and dots of one image are. Raises ValueError if there is no room for them."""
    lengths = [options.num_dashes] * 2
    lengths += [options.distractor_dashes] * options.num_distractors
    for _ in range(IMAGES):
        room = _Room(options)
        snakes: list[list[complex]] = []
        for length in lengths:
            points = _place(length, room, options, generator)
            if points is None:
                break
            room.take(points)
            snakes.append([point for index, point in enumerate(points) if index % 3 != 1])
        else:
            ends = [(snake[0], snake[-1]) for snake in snakes[:2]]
            if is_connected:
                return Drawing(snakes, ends[0])
            first, second = (pair[generator.integers(2)] for pair in ends)
            return Drawing(snakes, (first, second))
    raise ValueError(
        f"the snakes must fit into the image: {IMAGES} tries found no room for {sum(lengths)} "
        f"dashes on {options.size} × {options.size} pixels. Draw fewer or shorter ones, or on a "
        "larger image."
    )


class _Room:
    """Where a dash may be: a grid of cells, a quarter of a pixel wide, that are free or taken."""

    CELLS = 4  # in a row, to a pixel

    def __init__(self, options: Pathfinder) -> None:
        cells, border = self.CELLS * options.size, math.ceil(self.CELLS * options.dot_radius)
        self.is_free = np.zeros((cells, cells), bool)
        self.is_free[border:-border, border:-border] = True
        reach = round(self.CELLS * options.clearance)
        steps = np.arange(-reach, reach + 1)
        self.reach, self.is_far = reach, np.hypot(*np.meshgrid(steps, steps)) > reach

    def has(self, point: complex) -> bool:
        """Whether it is free."""
        i, j = int(point.real * self.CELLS), int(point.imag * self.CELLS)
        return min(i, j) >= 0 and max(i, j) < len(self.is_free) and bool(self.is_free[i, j])

    def start(self, generator: np.random.Generator) -> complex | None:
        """A free place; None where there is none."""
        free = np.flatnonzero(self.is_free)
        if not len(free):
            return None
        i, j = divmod(int(generator.choice(free)), len(self.is_free))
        return complex(i + 0.5, j + 0.5) / self.CELLS

    def take(self, points: list[complex]) -> None:
        """Keep others clear of these."""
        for point in points:
            i, j = (int(x * self.CELLS) - self.reach for x in (point.real, point.imag))
            top, left = max(i, 0), max(j, 0)
            cells = self.is_free[top : i + len(self.is_far), left : j + len(self.is_far)]
            height, width = cells.shape
            cells &= self.is_far[top - i :, left - j :][:height, :width]


def _place(
    length: int, room: _Room, options: Pathfinder, generator: np.random.Generator
) -> list[complex] | None:
    """Start, middle and end of each dash of a snake that keeps clear of the others and of itself;
    None where none was found.
    """
    for _ in range(SNAKES):
        start = room.start(generator)
        points: list[complex] = []
        failed = 0
        for turn in generator.uniform(-1, 1, TURNS * length).tolist():
            if start is None:
                return None
            if points:
                way = (points[-1] - points[-3]) / options.dash
                dash = _dash(points[-1] + options.gap * way, way, turn * options.max_turn, options)
            else:
                dash = _dash(start, 1 + 0j, turn * math.pi, options)
            # A dash is nearer to the last one than to any other.
            if all(map(room.has, dash)) and _apart(dash, points[:-3], options.clearance):
                points += dash
                failed = 0
                if len(points) == 3 * length:
                    return points
            elif (failed := failed + 1) == RETREAT:
                del points[-6:]
                failed = 0
    return None


def _dash(start: complex, way: complex, turn: float, options: Pathfinder) -> list[complex]:
    """Start, middle and end, nearer to each other than snakes may come."""
    step = options.dash * way * cmath.rect(1, turn)
    return [start, start + step / 2, start + step]


def _apart(dash: list[complex], others: list[complex], clearance: float) -> bool:
    return all(abs(one - other) >= clearance for other in others for one in dash)


def render(drawing: Drawing, options: Pathfinder) -> UInt8[np.ndarray, "size size"]:
    """The image: a pixel is as bright as the part of it that a dash or a dot covers, nearly."""
    points = _pairs([point for snake in drawing.snakes for point in snake])
    starts, ways = points[::2, None], (points[1::2] - points[::2])[:, None]
    centers = np.arange(options.size, dtype=np.float32) + 0.5
    pixels = np.stack(np.meshgrid(centers, centers, indexing="ij"), -1).reshape(-1, 2)
    along = ((pixels - starts) * ways).sum(-1) / np.square(ways).sum(-1)
    nearest = starts + along.clip(0, 1)[..., None] * ways
    to_dash = np.sqrt(np.square(pixels - nearest).sum(-1)).min(0)
    to_dot = np.sqrt(np.square(pixels - _pairs(drawing.dots)[:, None]).sum(-1)).min(0)
    dashes = DASHES * (options.thickness / 2 + 0.5 - to_dash).clip(0, 1)
    dots = (options.dot_radius + 0.5 - to_dot).clip(0, 1)
    image = np.rint(BRIGHTEST * np.maximum(dashes, dots)).astype(np.uint8)
    return image.reshape(options.size, options.size)


def _pairs(points: Sequence[complex]) -> Float[np.ndarray, "points 2"]:
    return np.stack([np.real(points), np.imag(points)], -1).astype(np.float32)
