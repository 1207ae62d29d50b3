"""Draw the README's first picture, docs/overview.svg and .png, from the numbers of the benchmark.

python docs/draw_overview.py
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from performers.viz.figures import COLORS, STYLE
from performers.viz.files import save_figure
from performers.viz.speed import LINES

PICTURE = Path(__file__).with_name("overview.svg")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "attention.json"

# What a newcomer would train with, and what they would decode with.
TRAINING = {"exact": "exact", "relu": "ReLU", "near-field": "with near field"}
DECODING = {"exact": "exact", "plain": "softmax features", "near-field": "with near field"}


def overview_figure(results: dict[str, Any]) -> Figure:
    """The order of the products; time of a training step; time and memory of decoding a token."""
    with style.context(STYLE):
        figure = Figure(figsize=(10.6, 3.2), layout="constrained")
        products, training, decoding = figure.subplots(1, 3, width_ratios=[1.1, 1, 1])
        _draw_products(products)
        _draw_training(training, results)
        _draw_decoding(decoding, results)
        return figure


def _draw_products(axes: Axes) -> None:
    """Matrices as rectangles: (QKᵀ) V above, which forms length × length, Q′ (K′ᵀV) below."""
    exact, ours, value, kept = LINES["exact"][0], COLORS[0], COLORS[1], COLORS[3]
    # Left edge, lower edge, width, height, color and name of each.
    for x, y, width, height, color, name in (
        (0.0, 5.8, 5.0, 5.0, exact, "L × L"),
        (5.4, 5.8, 0.9, 5.0, value, "V"),
        (0.0, 0.0, 1.3, 5.0, ours, "Q′"),
        (1.7, 3.7, 0.9, 1.3, kept, "S"),
    ):
        axes.add_patch(Rectangle((x, y), width, height, color=color, alpha=0.16, linewidth=0))
        axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color))
        axes.text(x + width / 2, y + height / 2, name, ha="center", va="center", color=color)
    axes.text(6.9, 8.3, "exact: (QKᵀ) V\nevery query meets\nevery key", va="center", color=exact)
    axes.text(3.2, 5.0, "Performer: Q′ (K′ᵀV)", va="top", color=ours)
    axes.text(
        3.2,
        2.9,
        "S = K′ᵀV is m × d,\nwhatever the length L:\nthis is all that is kept",
        va="top",
        color=kept,
    )
    axes.set(
        xlim=(-0.2, 12.4), ylim=(-1.2, 10.9), aspect="equal", title="One product, grouped two ways"
    )
    axes.set_axis_off()


def _draw_training(axes: Axes, results: dict[str, Any]) -> None:
    rows = [row for row in results["time"] if row["causal"] and row["dtype"] == "float32"]
    lines = {
        name: [
            (row["length"], row["seconds"][name]["forward_backward"]["median"] * 1e3)
            for row in rows
        ]
        for name in TRAINING
    }
    words = {name: f"{TRAINING[name]}\n{lines[name][-1][1]:,.0f} ms" for name in TRAINING}
    _draw_lines(axes, lines, words)
    axes.set(title="Training step, causal, ms", xlabel="length L")


def _draw_decoding(axes: Axes, results: dict[str, Any]) -> None:
    rows = results["decoding"]
    lines = {
        name: [(row["context"], row["seconds"][name]["median"] * 1e3) for row in rows]
        for name in DECODING
    }
    words = {
        name: f"{DECODING[name]}\nkeeps {rows[-1]['bytes'][name] / 2**20:,.1f} MiB"
        for name in DECODING
    }
    _draw_lines(axes, lines, words)
    axes.set(title="Decoding one token, ms", xlabel="tokens before it")


def _draw_lines(
    axes: Axes, lines: dict[str, list[tuple[int, float]]], words: dict[str, str]
) -> None:
    """A line of (x, y) for each mechanism, with its words beside the last point."""
    # The two Performers end near each other: words above the one and below the other.
    ranked = sorted(lines, key=lambda name: lines[name][-1][1])
    sides = dict(zip(ranked, ("top", "bottom", "center"), strict=True))
    for name, points in lines.items():
        color, _ = LINES[name]
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, marker="o", markersize=4)
        axes.annotate(
            words[name], (xs[-1], ys[-1]), (7, 0), textcoords="offset points", va=sides[name],
            color=color,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    save_figure(overview_figure(json.loads(RESULTS.read_text(encoding="utf-8"))), PICTURE)
