"""`performers reproduce`: run an experiment of the paper and save its results."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from performers.cli.answers import Answer, remark
from performers.cli.errors import one_line_errors

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[str, typer.Argument(help="A folder of experiments/, such as figure-4.")],
    scale: Annotated[
        Literal["smoke", "reduced", "paper"],
        typer.Option(help="Seconds, a minute, or the paper's own sizes."),
    ] = "reduced",
    draw_only: Annotated[
        bool, typer.Option("--draw-only", help="Draw again from the numbers of an earlier run.")
    ] = False,
) -> Answer:
    """Run an experiment of the paper and save its numbers, its figure and its README.

    Examples:

        performers reproduce figure-4 --scale smoke

        performers reproduce theorem-1 --scale paper --draw-only
    """
    from performers.records import TimeLeft, UnsavedError
    from performers.reproduction import Reproduction, experiment_folder

    with one_line_errors():
        reproduction = Reproduction.prepare(experiment_folder(name), scale)
        if draw_only:
            written = reproduction.draw()
        else:
            left = TimeLeft(reproduction.seconds_of_the_last_run())
    if not draw_only:
        with one_line_errors((ModuleNotFoundError, UnsavedError)):  # weights come in a package
            written = reproduction.run(lambda line: remark(f"{line} ({left()})"))
    return Answer({"written": written}, [f"Wrote {path}" for path in written])
