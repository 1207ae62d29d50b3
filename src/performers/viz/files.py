"""Figures as files that are the same bytes for the same figure, and as parts of a page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["Figure", "data_url", "save_figure"]


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write `figure` as PNG and as SVG, under `path` with these suffixes.

    An SVG has a date and random ids unless told otherwise, and would differ after every run.
    """
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    with rc_context({"svg.hashsalt": path.name, "savefig.dpi": 160}):
        figure.savefig(paths[0])
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def data_url(figure: Figure) -> str:
    """The figure as a PNG inside a URL: a page with it loads no other file."""
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
