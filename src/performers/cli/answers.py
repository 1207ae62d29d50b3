"""What all commands have in common: an answer, and how much they say on the way.

command(…) ─► Answer ─► stdout, in words or, with --json, as one JSON document
remarks, bars, warnings ─► stderr, unless --quiet
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from performers.cli.interrupts import saying_when_interrupted

__all__ = ["Answer", "answering", "is_verbose", "remark"]

# What the libraries below read when they are imported, which is after the options are read.
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
VERBOSE = {"TRANSFORMERS_VERBOSITY": "info"}

_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_verbose: ContextVar[bool] = ContextVar("verbose", default=False)


@dataclass(frozen=True)
class Answer:
    """What a command found: `record` for machines, `words` for people.

    Lines that an iterator makes are printed as they come; one of `record` becomes a list.
    """

    record: object
    words: str | Iterable[str]


def answering(command: Callable[..., Answer | None]) -> Callable[..., None]:
    """The command as the app calls it: with the options of all commands, printing its answer.

    A command that declares to return no `Answer` has no --json.
    """
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())
    common = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in COMMON_OPTIONS.items()
        if name != "json_output" or signature.return_annotation is not None
    ]

    @wraps(command)
    def answered(
        *, json_output: bool = False, verbose: bool = False, quiet: bool = False, **options: Any
    ) -> None:
        if verbose and quiet:
            raise typer.BadParameter("--verbose and --quiet exclude each other.")
        os.environ.update(QUIET if quiet else VERBOSE if verbose else {})
        marks = _quiet.set(quiet), _verbose.set(verbose)
        try:
            # What can go on says so itself, in the command.
            with (
                warnings.catch_warnings(),
                saying_when_interrupted(
                    "Give the same command again: it goes on with what it has kept, or begins anew."
                ),
            ):
                if quiet:
                    warnings.simplefilter("ignore")
                answer = command(**options)
                if answer is not None:
                    _print(answer, as_json=json_output)
        finally:
            _quiet.reset(marks[0])
            _verbose.reset(marks[1])

    parameters = [*own, *common]
    # In brackets the help would see the name of a style.
    answered.__doc__ = re.sub(r"\[(?=[a-z#/@])", r"\\[", command.__doc__ or "")
    answered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    answered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return answered


PANEL = "Options of every command"
COMMON_OPTIONS = {
    "json_output": Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON document in place of words.", rich_help_panel=PANEL
        ),
    ],
    "verbose": Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show what libraries log, and the traceback of an error.",
            rich_help_panel=PANEL,
        ),
    ],
    "quiet": Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print the answer and errors alone: no progress, no remarks, no warnings.",
            rich_help_panel=PANEL,
        ),
    ],
}


def remark(words: str) -> None:
    """Say on stderr how the work goes on; nothing under --quiet."""
    if not _quiet.get():
        typer.echo(words, err=True)


def is_verbose() -> bool:
    """Whether the command was given --verbose."""
    return _verbose.get()


def _print(answer: Answer, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(plain(answer.record), indent=2, ensure_ascii=False, allow_nan=False))
        return
    for line in [answer.words] if isinstance(answer.words, str) else answer.words:
        typer.echo(line)


def plain(tree: object) -> object:
    """The tree as JSON can hold it, which has neither infinity nor NaN: these become null."""
    if isinstance(tree, Mapping):
        return {str(name): plain(value) for name, value in tree.items()}
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if tree is None or isinstance(tree, str | int):
        return tree
    if isinstance(tree, Iterable):
        return [plain(value) for value in tree]
    return str(tree)
