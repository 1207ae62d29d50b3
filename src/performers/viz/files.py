"""Figures as files that are the same bytes for the same figure, and as parts of a page."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from performers.records.files import AGAIN, writing

__all__ = ["Figure", "data_url", "figure_files", "save_figure"]

# Dots per inch of a picture that is as wide as a page.
SHARP = 160


def figure_files(path: Path) -> list[Path]:
    """The files of a figure: a PNG and an SVG, under `path` with these suffixes."""
    return [path.with_suffix(".png"), path.with_suffix(".svg")]


def save_figure(figure: Figure, path: Path, then: str = AGAIN) -> list[Path]:
    """Write `figure` as the PNG and the SVG of `figure_files`.

    An SVG has a date and random ids unless told otherwise, and would differ after every run.

    Raises UnsavedError; `then` is that of `writing`.
    """
    paths = figure_files(path)
    with writing(path, then):
        with rc_context({"svg.hashsalt": path.name, "savefig.dpi": SHARP}):
            figure.savefig(paths[0])
            figure.savefig(paths[1], metadata={"Date": None})
        _rename_clips(paths[1])
    return paths


def _rename_clips(path: Path) -> None:
    """Number the clips of an SVG. Their names are hashes of coordinates, whose last digits the
    layout does not repeat.
    """
    text = path.read_text(encoding="utf-8")
    names = dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text))
    for number, name in enumerate(names):
        text = text.replace(name, f"clip{number}")
    path.write_text(text, encoding="utf-8")


def data_url(figure: Figure) -> str:
    """The figure as a PNG inside a URL: a page with it loads no other file."""
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=SHARP)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
