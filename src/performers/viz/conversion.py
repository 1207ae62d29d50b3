"""Figure of a conversion: what each layer gets wrong before and after its recovery."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

__all__ = ["conversion_figure"]


def conversion_figure(record: Mapping[str, Any]) -> Figure:
    """The error of every layer at each stage, from what conversion.json holds."""
    averaging, stages = record["averaging"], record["stages"]
    with style.context(STYLE):
        figure = Figure(figsize=(max(7.2, 2.4 + 0.5 * len(averaging)), 4.2), layout="constrained")
        axes = figure.subplots()
        positions = range(len(averaging))
        axes.plot(
            positions,
            list(averaging.values()),
            color=BASELINE_COLOR,
            linestyle="--",
            marker="_",
            label="averaging the values",
        )
        for color, (stage, found) in zip(COLORS, stages.items(), strict=False):
            errors = [found["layers"][name] for name in averaging]
            kept = "" if found["is_kept"] else ", undone"
            label = f"{stage} (distance {found['fidelity']['distance']:.4f}{kept})"
            axes.plot(positions, errors, color=color, marker="o", label=label)
        axes.set_ylim(bottom=0)
        axes.set_title("Relative error of the output of each attention layer, on held-out text")
        axes.set_xticks(positions, list(averaging), rotation=30, ha="right")
        figure.legend(loc="outside lower center", ncols=2)
        return figure
