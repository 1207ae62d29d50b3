"""`performers explore`: a local page to look at attention, estimates, costs, runs, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import remark
from performers.cli.errors import one_line_errors

__all__ = ["explore"]


def explore(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_RUN",
            help="A run folder, a Performer, a model of transformers or a converted one. Without "
            "it a tiny Performer with random weights, for proteins.",
        ),
    ] = None,
    runs: Annotated[
        Path | None,
        typer.Option(
            help="A folder of runs to compare. By default that of the run given, or runs/."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            help="The address to listen at. With another than this, whoever reaches this computer "
            "can use the page."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Open a page on this computer that shows what a model attends to, and what that costs.

    Attention: the matrix that a layer implies beside the exact one. Estimator: the variance of
    random features. Error and cost: settings of the near field and m. Runs: training runs
    compared. Generation: token by token. The page loads nothing from a network, and reports
    nothing.

    Examples:

        performers explore

        performers explore runs/demo

        performers explore path/to/model --port 8000 --no-browser
    """
    with one_line_errors():
        from performers.explore import build, load_subject, sample_subject, serve

        remark("reading the model")
        subject = sample_subject() if source is None else load_subject(source)
        page = build(subject, runs or _runs_beside(source))
        address = serve(page, host, port, opens_browser=browser)
    typer.echo(f"The page is at {address} until Ctrl-C.")
    page.block_thread()


def _runs_beside(source: str | None) -> Path:
    """The folder that the given run lies in, or runs/."""
    is_run = source is not None and (Path(source) / "metrics.json").is_file()
    return Path(source).parent if source is not None and is_run else Path("runs")
