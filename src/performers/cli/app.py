"""The table of commands.

Each is a file of its own, which declares options, calls the layers below, and returns its answer.
The layers are imported when it runs: `performers --help` answers without loading torch. What all
commands have in common, as the options --json, --verbose and --quiet, is added here.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from performers.cli.answers import Answer, answering
from performers.cli.benchmark import benchmark
from performers.cli.convert import convert
from performers.cli.diagnose import diagnose
from performers.cli.embed import embed
from performers.cli.evaluate import evaluate
from performers.cli.explore import explore
from performers.cli.fill import fill
from performers.cli.generate import generate
from performers.cli.import_checkpoint import import_checkpoint
from performers.cli.info import info
from performers.cli.plan import plan
from performers.cli.proteins import proteins
from performers.cli.report import report
from performers.cli.reproduce import reproduce
from performers.cli.train import train

__all__ = ["COMMANDS", "app", "main"]

# By the words that call them, in the order of the help: a new command is a file and a row.
COMMANDS: dict[str, Callable[..., Answer | None]] = {
    "train": train,
    "evaluate": evaluate,
    "generate": generate,
    "embed": embed,
    "fill": fill,
    "report": report,
    "plan": plan,
    "convert": convert,
    "import-checkpoint": import_checkpoint,
    "diagnose": diagnose,
    "explore": explore,
    "benchmark": benchmark,
    "reproduce": reproduce,
    "info": info,
    "data proteins": proteins,
}

# Help for the first of two words.
GROUPS = {"data": "Fetch data sets."}

app = typer.Typer(
    name="performers",
    help="Train, evaluate and sample from Performers: Transformers with linear-time attention.",
    epilog="Exit codes: 0 done, 2 refused (the last line says why), 130 interrupted, 1 a fault.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
groups = {name: typer.Typer(help=text, no_args_is_help=True) for name, text in GROUPS.items()}
for words, command in COMMANDS.items():
    first, _, last = words.rpartition(" ")
    (groups[first] if first else app).command(last)(answering(command))
for name, group in groups.items():
    app.add_typer(group, name=name)


def main() -> None:
    """Entry point of the `performers` command."""
    app()
