"""Figures of a training run, drawn from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

__all__ = ["attention_figure", "curves_figure"]

# The model of the run first, then what it is compared with; told apart in gray print, too.
COLORS = ("#1f5fbf", "#d1662b", "#3a8f6a", "#7b4fa3", "#8a6d1f")
BASELINE_COLOR = "#6b7280"

HIDDEN_COLOR = "#e5e7eb"

LARGEST_RATIO = 16

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": "#374151",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def curves_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], baseline: Mapping[str, float]
) -> Figure:
    """Loss and accuracy against optimizer steps, the empirical baseline as a dashed line.

    `histories`: of each model the Trainer's log, entries with "step" and "loss" (training) or
    "eval_loss" and "eval_accuracy" (validation). `baseline`: "loss" and "accuracy".
    """
    with style.context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), layout="constrained")
        loss, accuracy = figure.subplots(1, 2)
        for color, (name, history) in zip(COLORS, histories.items(), strict=False):
            _line(loss, history, "loss", color=color, alpha=0.35, linewidth=1)
            _line(loss, history, "eval_loss", color=color, marker="o", markersize=3, label=name)
            _line(
                accuracy,
                history,
                "eval_accuracy",
                color=color,
                marker="o",
                markersize=3,
                label=name,
            )
        for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
            axes.axhline(
                baseline[key], color=BASELINE_COLOR, linestyle="--", label="empirical baseline"
            )
            axes.set_xlabel("optimizer steps")
            axes.margins(x=0.02)
        loss.set_title("Loss in nats (faint: training, dots: validation)")
        accuracy.set_title("Validation accuracy")
        accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        loss.legend()
        return figure


def _line(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def attention_figure(
    matrices: Float[np.ndarray, "layers heads length length"], layer_numbers: Sequence[int]
) -> Figure:
    """The attention matrices of one sequence: a row of panels per layer, a panel per head.

    Colors say how many times its even share an entry is (1/length, or 1/i in row i of a causal
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
