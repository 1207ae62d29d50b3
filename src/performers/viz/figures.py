"""Figures of a training run, drawn from its numbers alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import BboxBase

__all__ = [
    "attention_figure",
    "curves_figure",
    "label_accuracies",
    "label_points",
    "legend_of_accuracies",
]

# The first color is that of the run's own model. All can be told apart in gray print, too.
COLORS = ("#1f5fbf", "#d1662b", "#3a8f6a", "#7b4fa3", "#8a6d1f")
BASELINE_COLOR = "#6b7280"

HIDDEN_COLOR = "#e5e7eb"

LARGEST_RATIO = 16

# How many entries of the log a training loss is averaged over.
SMOOTHED = 10

LINE_TO_ITS_POINT = {"arrowstyle": "-", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def curves_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    baseline: Mapping[str, float],
    unit: str = "bits per character",
) -> Figure:
    """Bits per character, or another `unit`, against seconds of training, and against tokens seen.

    The first panel compares models at equal time, the second at equal data. Validation in dots,
    training faint and smoothed, the empirical baseline as a dashed line.
    `histories`: of each model the Trainer's log, entries with "seconds", "num_input_tokens_seen"
    and "loss" (training) or "eval_loss" (validation), in nats. `baseline`: "bits_per_character".
    """
    with style.context(STYLE):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        shown = [baseline["bits_per_character"]]
        for axes, key, scale in zip(
            panels, ("seconds", "num_input_tokens_seen"), (1.0, 1e-6), strict=True
        ):
            for color, (name, history) in zip(COLORS, histories.items(), strict=False):
                where, bits = _curve(history, key, "loss")
                axes.plot(where * scale, _smoothed(bits), color=color, alpha=0.35, linewidth=1)
                where, bits = _curve(history, key, "eval_loss")
                axes.plot(where * scale, bits, color=color, marker="o", markersize=4, label=name)
                shown += [*bits, *_smoothed(_curve(history, key, "loss")[1])[-1:]]
            axes.axhline(shown[0], color=BASELINE_COLOR, linestyle="--", label="empirical baseline")
            axes.margins(x=0.02)
        panels[0].set_xlabel("seconds of training")
        panels[1].set_xlabel("million tokens seen")
        panels[0].set_title(f"{unit.capitalize()} (dots: validation, faint: training)")
        panels[1].set_title("The same against tokens")
        # Losses of the first steps are so large that, with them, the curves could not be told
        # apart.
        low, high = min(shown), max(shown)
        panels[0].set_ylim(low - 0.1 * (high - low), high + 0.25 * (high - low))
        panels[0].legend()
        return figure


def _curve(
    history: Sequence[Mapping[str, Any]], where: str, loss: str
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Where a loss was logged, and the loss in bits."""
    points = [(entry[where], entry[loss] / np.log(2)) for entry in history if loss in entry]
    columns = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return columns[0], columns[1]


def _smoothed(values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """The mean of every entry and the `SMOOTHED` - 1 entries before it, or as many as there are."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - SMOOTHED, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def label_accuracies(axes: Axes, title: str, baseline: float) -> None:
    """What curves of accuracy against seconds of training need: labels, and the baseline."""
    axes.axhline(baseline, color=BASELINE_COLOR, linestyle=":")
    axes.set(title=title, xlabel="seconds of training", ylabel="accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=1))


def legend_of_accuracies(figure: Figure, colors: Mapping[str, str], columns: int) -> None:
    """Below all panels: the models by color, the training set dashed, the validation set solid."""
    handles = [Line2D([], [], color=color, label=name) for name, color in colors.items()]
    handles += [
        Line2D([], [], color="black", linestyle="--", label="training set"),
        Line2D([], [], color="black", label="validation set"),
        Line2D([], [], color=BASELINE_COLOR, linestyle=":", label="empirical baseline"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def label_points(axes: Axes, places: Mapping[str, tuple[float, float]], size: float = 8) -> None:
    """Write the names of points over them, each moved up or down until no name covers another.

    For points and limits that are all drawn; a name that was moved has a line to its point.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure), "axes are those of a figure"
    figure.draw_without_rendering()  # where the axes are
    taken: list[BboxBase] = []
    heights = itertools.chain([0], (sign * n for n in itertools.count(1) for sign in (1, -1)))
    lines = list(itertools.islice(heights, 2 * len(places)))
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        for height in lines:
            label = axes.annotate(
                name, place, (0, 1.4 * size * height), textcoords="offset points", ha="center",
                va="center", fontsize=size,
                arrowprops=LINE_TO_ITS_POINT if height else None,
            )  # fmt: skip
            label.set_in_layout(False)
            label.get_window_extent()  # puts it into its place
            box = Text.get_window_extent(label)  # of the name alone, without its line
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        taken.append(box)


def attention_figure(
    matrices: Float[np.ndarray, "layers heads length length"], layer_numbers: Sequence[int]
) -> Figure:
    """The attention matrices of one sequence: a row of panels per layer, a panel per head.

    Colors show entries as multiples of the even share (1/length, or 1/i in row i of a causal
    matrix, whose future is left gray), on one logarithmic scale for all panels of all figures.
    `layer_numbers` count from 0.
    """
    layers, heads, length, _ = matrices.shape
    is_causal = not np.triu(matrices, 1).any()
    visible = np.arange(1, length + 1)[:, None] if is_causal else length
    hidden = np.triu(np.ones((length, length), bool), 1) if is_causal else np.False_
    scale = LogNorm(vmin=1 / LARGEST_RATIO, vmax=LARGEST_RATIO, clip=True)
    with style.context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1.8 + 1.95 * heads, 0.7 + 1.95 * layers), layout="constrained")
        panels = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
        for layer, head in np.ndindex(layers, heads):
            axes = panels[layer, head]
            ratio = np.maximum(matrices[layer, head].astype(np.float32) * visible, 1e-9)
            axes.set_facecolor(HIDDEN_COLOR)
            image = axes.imshow(np.ma.masked_where(hidden, ratio), cmap="RdBu_r", norm=scale)
            axes.set_xticks([0, length - 1], ["1", str(length)])
            axes.set_yticks([0, length - 1], ["1", str(length)])
            if layer == 0:
                axes.set_title(f"head {head + 1}")
            if head == 0:
                axes.set_ylabel(f"layer {layer_numbers[layer] + 1}")
        bar = figure.colorbar(image, ax=panels, shrink=0.8, label="times the even share")
        ticks = [1 / LARGEST_RATIO, 1 / 4, 1, 4, LARGEST_RATIO]
        bar.set_ticks(ticks, labels=["≤ 1/16", "1/4", "1", "4", "≥ 16"])
        bar.outline.set_visible(False)
        figure.supxlabel("residue attended to", fontsize=10, color="#374151")
        figure.supylabel("residue that attends", fontsize=10, color="#374151")
        return figure
