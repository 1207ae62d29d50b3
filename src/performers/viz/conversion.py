"""Figure of a conversion: what each layer gets wrong before and after its recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
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
        labels, words = _numbered(list(averaging))
        axes.set_xticks(positions, labels)
        axes.set_xlabel(words)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def _numbered(names: Sequence[str]) -> tuple[list[str], str]:
    """What tells the names apart, most often the numbers of layers, and the words around that."""
    if len(names) == 1:
        return list(names), ""
    parts = [name.split(".") for name in names]
    start = _shared(parts)
    end = _shared([part[start:][::-1] for part in parts])
    labels = [".".join(part[start : len(part) - end]) for part in parts]
    return labels, ".".join([*parts[0][:start], "…", *parts[0][len(parts[0]) - end :]])


def _shared(rows: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    columns = zip(*rows, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
