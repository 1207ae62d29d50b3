"""Figures as files that are the same bytes for the same figure."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["Figure", "save_figure"]


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `figure` as PNG and as SVG, under `path` with these suffixes.

    An SVG has a date and random ids unless told otherwise, and would differ after every run.
    """
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with rc_context({"svg.hashsalt": path.name, "savefig.dpi": 160}):
        figure.savefig(paths[0])
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
