"""The benchmark of one attention layer as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

__all__ = ["speed_figure"]

EXACT_COLOR = "#111827"
# Softmax features are blue, ReLU features green, near fields purple; other libraries dotted.
LINES = {
    "exact": (EXACT_COLOR, "-"),
    "plain": (COLORS[0], "-"),
    "sharp": (COLORS[0], "--"),
    "relu": (COLORS[2], "-"),
    "near-field": (COLORS[3], "-"),
    "near-field-wide": (COLORS[3], "--"),
    "near-alone": (COLORS[3], "-."),
    "performer-pytorch": (COLORS[1], ":"),
    "performer-pytorch-relu": (COLORS[4], ":"),
    "flash-linear-attention": (COLORS[1], "-."),
    "identity": (BASELINE_COLOR, "--"),
}


def speed_figure(result: Mapping[str, Any]) -> Figure:
    """Microseconds per token of forward and backward against the length: a row for each dtype, a
    panel for each mode, decoding in the last. Bands are quartiles. A line ends where memory or
    patience ended.
    """
    dtypes, decoding = result["plan"]["dtypes"], result["decoding"]
    with style.context(STYLE):
        columns = 2 + bool(decoding)
        figure = Figure(figsize=(4.2 * columns, 0.9 + 3.4 * len(dtypes)), layout="constrained")
        grid = figure.subplots(len(dtypes), columns, squeeze=False)
        for panels, dtype in zip(grid, dtypes, strict=True):
            for axes, causal in zip(panels, (False, True), strict=False):
                points = [
                    (row["length"], row["length"], _both(row["seconds"]))
                    for row in result["time"]
                    if (row["dtype"], row["causal"]) == (dtype, causal)
                ]
                _draw(axes, points)
                mode = "causal" if causal else "bidirectional"
                axes.set(title=f"training, {mode}, {dtype}", xlabel="length L")
            panels[0].set_ylabel("microseconds per token")
        if decoding:
            _draw(grid[0][-1], [(row["context"], 1, row["seconds"]) for row in decoding])
            grid[0][-1].set(title="decoding, float32", xlabel="tokens of context")
            for panels in grid[1:]:
                panels[-1].set_axis_off()
        drawn = {
            label: handle
            for axes in grid.flat
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        names = [name for name in LINES if name in drawn]
        handles = [drawn[name] for name in names]
        figure.legend(handles, names, loc="outside lower center", ncols=5)
    return figure


def _both(seconds: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parts["forward_backward"] for name, parts in seconds.items()}


def _draw(axes: Any, points: Sequence[tuple[int, int, Mapping[str, Any]]]) -> None:
    """Points are (x, tokens that the seconds are for, seconds of each mechanism)."""
    for name, (color, line) in LINES.items():
        measured = [
            (x, *(seconds[name][share] * 1e6 / tokens for share in SHARES))
            for x, tokens, seconds in points
            if isinstance(seconds.get(name), Mapping)
        ]
        if not measured:
            continue
        xs, lower, median, upper = zip(*measured, strict=True)
        axes.plot(xs, median, line, color=color, marker="o", markersize=3.5, label=name)
        axes.fill_between(xs, lower, upper, color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")


SHARES = ("lower_quartile", "median", "upper_quartile")
