"""`performers train`: a model, its checkpoints and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors
from performers.cli.interrupts import saying_how_to_resume

__all__ = ["train"]


def train(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped config (see `info`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set, dotted."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/CONFIG unless given.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the folder.")
    ] = False,
    if_exists: Annotated[
        Literal["refuse", "show"],
        typer.Option(
            help="If the folder holds a run: refuse, or show its results (and go on with it "
            "if it is not finished)."
        ),
    ] = "refuse",
) -> Answer | None:
    """Train a model and write a report.

    Keys under `trainer` are those of transformers' TrainingArguments, keys under `model` those of
    PerformerConfig.

    Examples:

        performers train demo

        performers train demo model.attention=performer-positive max_seconds=60

        performers train demo trainer.bf16=true --output runs/bf16

        performers train demo pretrained.model=path/to/llama data.text=book.txt data.length=512

        torchrun --nproc-per-node 2 -m performers.cli train demo --output runs/two
    """
    from performers.records import DamagedFileError
    from performers.train import (
        LostProcessError,
        Run,
        UnsavedError,
        has_finished,
        holds_run,
        load_config,
        results_table,
    )

    folder = output or Path("runs") / Path(config).stem
    with one_line_errors():
        if if_exists == "show" and holds_run(folder):
            if has_finished(folder):
                return _earlier_results(folder)
            resume = True
        run = Run.prepare(load_config(config, overrides or []), folder, resume=resume)
    expected = (FloatingPointError, UnsavedError, LostProcessError, DamagedFileError)
    again = ["performers", "train", config, *(overrides or []), "--output", str(folder)]
    with one_line_errors(expected), saying_how_to_resume(again):
        metrics = run.train()
    if metrics is None:  # another rank writes the report
        return None
    from performers.viz import write_report

    with one_line_errors((UnsavedError, DamagedFileError)):
        report = write_report(folder)
    return Answer(metrics, f"{results_table(metrics)}\n\nReport: {report}")


def _earlier_results(folder: Path) -> Answer:
    """The table of a finished run, whose report is drawn if it is missing."""
    from performers.records import holding, read_json
    from performers.train import results_table

    report = folder / "report.html"
    with one_line_errors():
        remedy = "Delete it, and train --resume writes it anew."
        metrics = read_json(folder / "metrics.json", remedy)
        with holding(folder / "metrics.json", "the numbers of a run", remedy):
            table = results_table(metrics)
        if not report.exists():
            from performers.viz import write_report

            write_report(folder)
    return Answer(metrics, f"{table}\n\nThis run is finished. Report: {report}")
