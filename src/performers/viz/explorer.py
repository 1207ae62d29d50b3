"""Figures of the explorer: matrices beside the exact ones, rows, estimates of a kernel, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from performers.viz.figures import BASELINE_COLOR, COLORS, HIDDEN_COLOR, LARGEST_RATIO, STYLE

__all__ = ["estimates_figure", "matrices_figure", "memory_figure", "row_figure"]

Matrix = Float[np.ndarray, "length length"]

# More letters than this are not written under a row.
MOST_LETTERS = 70


def matrices_figure(
    exact: Matrix, implied: Matrix, is_causal: bool, first: int, last: int, picked: int
) -> Figure:
    """Exact attention, the implied matrix, and implied − exact, for positions `first` to `last`,
    which count from 0 and both belong to the view.

    The first two have the colors of `attention_figure`: multiples of the even share, on a
    logarithmic scale. The third is linear and symmetric around 0, and reaches to a thousandth of
    the largest weight at least, so that rounding has no color. A line marks the row `picked`.
    """
    view = slice(first, last + 1)
    length = len(exact)
    share = np.arange(1, length + 1)[:, None] if is_causal else np.full((length, 1), length)
    hidden = (
        np.triu(np.ones((length, length), bool), 1) if is_causal else np.zeros_like(exact, bool)
    )
    ratio = LogNorm(vmin=1 / LARGEST_RATIO, vmax=LARGEST_RATIO, clip=True)
    # Positions are counted from 1, as residues are.
    extent = (first + 0.5, last + 1.5, last + 1.5, first + 0.5)
    difference = implied - exact
    largest = max(
        float(np.abs(difference[view, view]).max()), float(exact[view, view].max()) / 1000
    )
    largest = max(largest, 1e-9)
    with style.context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(12.6, 4.6), layout="constrained")
        panels = figure.subplots(1, 3)
        for axes, matrix, title in zip(
            panels, (exact, implied), ("exact softmax", "implied by the layer"), strict=False
        ):
            shown = np.ma.masked_where(hidden, np.maximum(matrix * share, 1e-9))[view, view]
            image = axes.imshow(shown, cmap="RdBu_r", norm=ratio, extent=extent)
            axes.set_title(title)
        bar = figure.colorbar(image, ax=list(panels[:2]), shrink=0.8, label="times the even share")
        ticks = [1 / LARGEST_RATIO, 1 / 4, 1, 4, LARGEST_RATIO]
        bar.set_ticks(ticks, labels=["≤ 1/16", "1/4", "1", "4", "≥ 16"])
        shown = np.ma.masked_where(hidden, difference)[view, view]
        image = panels[2].imshow(shown, cmap="PuOr_r", vmin=-largest, vmax=largest, extent=extent)
        panels[2].set_title("implied − exact")
        figure.colorbar(image, ax=panels[2], shrink=0.8, label="weight")
        for axes in panels:
            axes.set_facecolor(HIDDEN_COLOR)
            axes.set_xlabel("attended to")
            if first <= picked <= last:
                axes.axhline(picked + 1, color="black", linewidth=0.8, linestyle=":")
        panels[0].set_ylabel("attends")
        return figure


def row_figure(
    exact: Float[np.ndarray, " length"],
    implied: Float[np.ndarray, " length"],
    words: Sequence[str],
    first: int,
    last: int,
    picked: int,
) -> Figure:
    """What the position `picked` attends to, along the sequence: implied weights as bars, exact
    ones as a line. Positions count from 0; letters are written where there is room.
    """
    where = np.arange(first, last + 1)
    view = slice(first, last + 1)
    with style.context(STYLE):
        figure = Figure(figsize=(12.6, 2.9), layout="constrained")
        axes = figure.subplots()
        edges = np.append(where + 0.5, last + 1.5)
        axes.stairs(
            implied[view],
            edges,
            fill=True,
            color=COLORS[0],
            alpha=0.6,
            label="implied by the layer",
        )
        axes.step(where + 1, exact[view], where="mid", color=COLORS[1], label="exact softmax")
        if first <= picked <= last:
            axes.axvline(picked + 1, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(f"What {words[picked]} at position {picked + 1} attends to")
        axes.set_ylabel("weight")
        axes.margins(x=0.01)
        if len(where) <= MOST_LETTERS:
            long = max(len(word) for word in words[view]) > 1
            axes.set_xticks(where + 1, words[view], rotation=90 if long else 0, fontsize=8)
        else:
            axes.set_xlabel("position")
        axes.legend(loc="upper right")
        return figure


def estimates_figure(
    values: Float[np.ndarray, " draws"],
    truth: float,
    expected: float,
    closed_form: float | None,
    lengths: tuple[float, float],
    angle: float,
) -> Figure:
    """The two vectors, and the histogram of the estimates of their kernel.

    `truth`: exp(x·y). `expected`: what the estimates have on average, another number for
    regularized features. `closed_form`: their variance, drawn as a band of one standard deviation
    to both sides. `angle` in degrees.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(11.4, 4.0), layout="constrained")
        vectors, histogram = figure.subplots(1, 2, width_ratios=(1, 2.2))
        radians = math.radians(angle)
        for name, length, turn, color in (
            ("x", lengths[0], 0.0, COLORS[0]),
            ("y", lengths[1], radians, COLORS[1]),
        ):
            end = (length * math.cos(turn), length * math.sin(turn))
            vectors.annotate(
                "", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2}
            )
            vectors.annotate(name, end, (4, 4), textcoords="offset points", color=color)
        reach = 1.15 * max(*lengths, 0.5)
        vectors.set(xlim=(-reach, reach), ylim=(-0.15 * reach, reach), aspect="equal")
        vectors.set_title("the two vectors")
        low, high = np.quantile(values, [0.005, 0.995])
        low, high = min(low, truth, expected), max(high, truth, expected)
        room = 0.05 * (high - low) + 1e-9
        inside = (low - room, high + room)
        histogram.hist(np.clip(values, *inside), bins=60, range=inside, color=COLORS[0], alpha=0.6)
        if closed_form is not None:
            spread = math.sqrt(closed_form)
            histogram.axvspan(
                expected - spread, expected + spread, color=COLORS[2], alpha=0.15,
                label="± one standard deviation, closed form",
            )  # fmt: skip
        histogram.axvline(truth, color="black", linestyle="--", label="exp(x·y)")
        histogram.axvline(float(values.mean()), color=COLORS[1], label="mean of the estimates")
        histogram.set_xlim(*inside)
        histogram.set_title("Estimates of exp(x·y), one for each draw of ω")
        histogram.set_yticks([])
        histogram.legend()
        return figure


def memory_figure(tokens: Sequence[int], sizes: Mapping[str, Sequence[float]]) -> Figure:
    """Kilobytes that a model remembers after each number of tokens, a line for each kind."""
    with style.context(STYLE):
        figure = Figure(figsize=(8.4, 3.4), layout="constrained")
        axes = figure.subplots()
        colors: Sequence[Any] = (COLORS[0], BASELINE_COLOR)
        for color, (name, of) in zip(colors, sizes.items(), strict=True):
            axes.plot(tokens, np.asarray(of) / 1024, color=color, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens read and written")
        axes.set_title("Kilobytes that the model remembers")
        axes.legend()
        return figure
