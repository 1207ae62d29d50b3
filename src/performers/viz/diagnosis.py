"""Figures of a diagnosis: what linear attention gets wrong in a model, why, and what less costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

__all__ = ["diagnosis_figure", "frontier_figure"]


def diagnosis_figure(layers: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """The error, the features in use and E‖q + k‖² of every head (dots) and layer (means).

    `layers`: of each layer and kind of features a `Diagnosis` as a dict, its "heads" a list of
    dicts.
    """
    panels = {
        "observed_error": "Error of the output",
        "effective_features": "Features that carry it",
        "mean_square_sum": "E‖q + k‖², what the variance grows with",
    }
    kinds = list(next(iter(layers.values())))
    with style.context(STYLE):
        figure = Figure(figsize=(max(9.6, 2.4 + 0.9 * len(layers)), 8.4), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True)
        for axes, (name, title) in zip(all_axes, panels.items(), strict=True):
            for index, kind in enumerate(kinds):
                shift = 0.22 * (index - (len(kinds) - 1) / 2)
                _draw(axes, layers, kind, name, shift=shift, color=COLORS[index % len(COLORS)])
            axes.set_title(title)
        error, features, spread = all_axes
        uniform = [_mean(of[kinds[0]], "uniform_error") for of in layers.values()]
        error.plot(
            uniform, color=BASELINE_COLOR, linestyle="--", marker="_", label="averaging the values"
        )
        error.set_ylim(bottom=0)
        features.set_yscale("log")
        features.set_ylim(bottom=0.9)
        spread.set_yscale("log")
        spread.set_xticks(range(len(layers)), list(layers), rotation=30, ha="right")
        figure.legend(*error.get_legend_handles_labels(), loc="outside upper right", ncols=4)
        return figure


def frontier_figure(frontier: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> Figure:
    """The error of every setting against its counted operations, as multiples of exact attention's.

    `frontier`: a `Frontier` as a dict. Settings of one near field share a line; those on the
    frontier are circled, with their m beside. `chosen`: a `Setting` as a dict, marked by a star.
    """
    with style.context(STYLE):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        axes = figure.subplots()
        exact = frontier["exact_operations"]
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for setting in sorted(frontier["settings"], key=lambda x: x["window_size"] or 0):
            near = f", blocks of {setting['window_size']}" if setting["window_size"] else ""
            groups.setdefault(f"{setting['features']}{near}", []).append(setting)
        shades = colormaps["viridis"].resampled(len(groups))
        for index, (name, settings) in enumerate(groups.items()):
            far = sorted(settings, key=lambda x: x["num_projections"])
            axes.plot(
                [x["operations"] / exact for x in far],
                [x["error"] for x in far],
                color=shades(index),
                linewidth=1,
                marker="o",
                markersize=4,
                linestyle="--" if name.startswith("positive") else "-",
                label=name,
            )
        best = [x for x in frontier["settings"] if x["is_on_frontier"]]
        axes.plot(
            [x["operations"] / exact for x in best],
            [x["error"] for x in best],
            color="black",
            linewidth=0,
            marker="o",
            markersize=9,
            markerfacecolor="none",
            label="cheapest for its error",
        )
        for x in best:
            label = str(x["num_projections"] or "near")
            axes.annotate(
                label, (x["operations"] / exact, x["error"]), (5, 5), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
        if chosen is not None:
            axes.plot(
                [chosen["operations"] / exact], [chosen["error"]], color=COLORS[1], linewidth=0,
                marker="*", markersize=15, label="chosen",
            )  # fmt: skip
        axes.axvline(1, color=BASELINE_COLOR, linestyle=":", label="exact attention")
        axes.axhline(
            frontier["averaging_error"], color=BASELINE_COLOR, linestyle="--", linewidth=1,
            label="averaging the values",
        )  # fmt: skip
        axes.set_xscale("log")
        # Labels as 3 × 10⁻¹ and 4 × 10⁻¹ would lie on each other.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("counted operations ÷ those of exact attention")
        axes.set_title(f"Relative error of the output at length {frontier['length']}, by m")
        figure.legend(loc="outside right upper")
        return figure


def _draw(
    axes: Axes,
    layers: Mapping[str, Mapping[str, Mapping[str, Any]]],
    kind: str,
    name: str,
    *,
    shift: float,
    color: str,
) -> None:
    for position, of in enumerate(layers.values()):
        numbers = [head[name] for head in of[kind]["heads"]]
        axes.plot([position + shift] * len(numbers), numbers, ".", color=color, alpha=0.35)
    means = [_mean(of[kind], name) for of in layers.values()]
    positions = [position + shift for position in range(len(layers))]
    axes.plot(positions, means, "_", color=color, markersize=14, markeredgewidth=2.5, label=kind)


def _mean(diagnosis: Mapping[str, Any], name: str) -> float:
    numbers = [head[name] for head in diagnosis["heads"]]
    return float(sum(numbers) / len(numbers))
