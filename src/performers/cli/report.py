"""`performers report`: the report of a run, drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["report"]


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
) -> Answer:
    """Draw the report of a run again from its metrics.json.

    Example:

        performers report runs/demo
    """
    from performers.viz import write_report

    with one_line_errors():
        path = write_report(run)
    return Answer({"report": path}, f"Report: {path}")
