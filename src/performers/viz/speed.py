"""The benchmark of one attention layer as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

__all__ = ["speed_figure"]

LINES = {
    "exact": (COLORS[1], "-"),
    "performer-pytorch": (COLORS[2], "-"),
    "performer": (COLORS[0], "-"),
    "identity": (BASELINE_COLOR, "--"),
}


def speed_figure(result: Mapping[str, Any]) -> Figure:
    """Microseconds per token of forward and backward against the length, a panel for each dtype and
    mode; decoding in the last. Bands are quartiles. A line ends where memory or patience ended.
    """
    settings = [(dtype, causal) for dtype in result["plan"]["dtypes"] for causal in (False, True)]
    with style.context(STYLE):
        count = len(settings) + bool(result["decoding"])
        figure = Figure(figsize=(3.6 * count, 3.8), layout="constrained")
        panels = figure.subplots(1, count, squeeze=False)[0]
        for axes, (dtype, causal) in zip(panels, settings, strict=False):
            rows = [r for r in result["time"] if (r["dtype"], r["causal"]) == (dtype, causal)]
            points = [
                (row["length"], row["length"], {n: p["forward_backward"] for n, p in parts.items()})
                for row in rows
                for parts in [row["seconds"]]
            ]
            _draw(axes, points)
            mode = "causal" if causal else "bidirectional"
            axes.set(title=f"training, {mode}, {dtype}", xlabel="length L")
        if result["decoding"]:
            points = [(row["context"], 1, row["seconds"]) for row in result["decoding"]]
            _draw(panels[-1], points)
            panels[-1].set(title="decoding, float32", xlabel="tokens of context")
        panels[0].set_ylabel("microseconds per token")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES))
    return figure


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
