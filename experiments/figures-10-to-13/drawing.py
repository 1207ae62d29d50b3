"""One picture of the four figures, from the saved numbers."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from performers.data.vocabulary import STANDARD_AMINO_ACIDS
from performers.viz.figures import COLORS, STYLE

from .heads import unpacked

# The residues of Figure 12.
FIRST = 25
KINDS = ("local", "vertical", "global")


def drawn(results: dict[str, Any]) -> Figure:
    roots = unpacked(results["attention"])
    layers, heads = roots.shape[:2]
    of_head = {(h["layer"], h["head"]): h for h in results["heads"] if h["layer"] <= layers}
    with style.context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(10.4, 4.4 + 1.3 * layers + 4.2 + 3.8), layout="constrained")
        parts = figure.subfigures(3, 1, height_ratios=[1.3 * layers + 0.4, 4.6, 3.8])
        parts[0].suptitle("Figure 10: every head, BPT1_BOVIN attends to itself", fontsize=11)
        grid = parts[0].subplots(layers, heads, squeeze=False)
        for (layer, head), found in of_head.items():
            axes = grid[layer - 1][head - 1]
            _matrix(axes, roots[layer - 1, head - 1])
            axes.set_title(f"{layer}-{head} {found['kind']}", fontsize=7)
        examples = {kind: _clearest(of_head.values(), kind) for kind in KINDS}
        shown = {kind: found for kind, found in examples.items() if found is not None}
        in_detail = list(shown.values())[:2]
        widths = [2] * len(in_detail) + [1] * len(shown)
        panels = parts[1].subplots(1, len(widths), width_ratios=widths)
        for axes, found in zip(panels, in_detail, strict=False):
            root = roots[found["layer"] - 1, found["head"] - 1]
            _matrix(axes, root)
            axes.set_title(f"Figure 11: head {found['layer']}-{found['head']}, {found['kind']}")
        for axes, found in zip(panels[len(in_detail) :], shown.values(), strict=True):
            root = roots[found["layer"] - 1, found["head"] - 1]
            _lines(axes, root[:FIRST, :FIRST] ** 2, results["sequence"][:FIRST])
            axes.set_title(f"Figure 12: {found['layer']}-{found['head']}, {found['kind']}", size=8)
        _similarities(parts[2].subplots(1, 3), results)
    return figure


def _clearest(found: Any, kind: str) -> dict[str, Any] | None:
    """The head of a kind that exceeds even attention by most; of the global ones, by least."""
    sign = -1 if kind == "global" else 1
    of_kind = [head for head in found if head["kind"] == kind]
    return max(of_kind, key=lambda head: sign * head["times"], default=None)


def _matrix(axes: Axes, root: np.ndarray) -> None:
    """Darker is more; the square root, so that small weights are seen."""
    axes.imshow(root, cmap="Blues", vmin=0, vmax=max(float(root.max()), 1e-6))
    axes.set(xticks=[], yticks=[])


def _lines(axes: Axes, weights: np.ndarray, letters: str) -> None:
    """Residues that attend on the left, what they attend to on the right."""
    count = len(letters)
    ends = [[(0, i), (1, j)] for i in range(count) for j in range(count)]
    opacity = (weights / max(float(weights.max()), 1e-6)).ravel()
    axes.add_collection(LineCollection(ends, colors=COLORS[0], alpha=opacity, linewidths=0.8))
    for row, letter in enumerate(letters):
        axes.text(-0.05, row, letter, ha="right", va="center", fontsize=7)
        axes.text(1.05, row, letter, ha="left", va="center", fontsize=7)
    axes.set(xlim=(-0.2, 1.2), ylim=(count, -1))
    axes.axis("off")


def _similarities(panels: Any, results: dict[str, Any]) -> None:
    """BLOSUM62, the trained model's similarity, and one against the other."""
    expected = np.array(results["blosum62"])
    trained = results["similarity"]["trained"]
    found = np.array(trained["matrix"])
    letters = list(STANDARD_AMINO_ACIDS)
    for axes, matrix, title in zip(
        panels, (expected, found), ("Figure 13: BLOSUM62, normalized", "from attention"),
        strict=False,
    ):  # fmt: skip
        picture = axes.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_xticks(range(len(letters)), letters, fontsize=7)
        axes.set_yticks(range(len(letters)), letters, fontsize=7)
        axes.set_title(title)
        axes.figure.colorbar(picture, ax=axes, shrink=0.6)
    axes = panels[2]
    for (row, a), (column, b) in combinations(enumerate(letters), 2):
        x, y = expected[row, column], found[row, column]
        is_named = a + b in ("DE", "FY")
        axes.plot(x, y, ".", color=COLORS[1] if is_named else COLORS[0])
        if is_named:
            axes.annotate(
                f"({a}, {b})", (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    axes.set_box_aspect(1)
    axes.set(
        title=f"correlation {trained['correlation']:+.2f}, p = {trained['p']:.2g}",
        xlabel="BLOSUM62, normalized", ylabel="from attention",
    )  # fmt: skip
