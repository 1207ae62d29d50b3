"""How a command fails: with one line for the user, and exit code 2."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from performers.cli.answers import is_verbose

__all__ = ["MISTAKES", "one_line_errors"]

# What the checks before long work raise.
MISTAKES = (ValueError, TypeError, OSError, ImportError)


@contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = MISTAKES) -> Iterator[None]:
    """Turn errors of these kinds into one line on stderr, after a traceback under --verbose.

    For the work itself only kinds that it raises on purpose are given: the traceback of any other
    error there is wanted.
    """
    try:
        yield
    except kinds as error:
        if is_verbose():
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"error: {' '.join(_words(error).split())}", err=True)
        raise typer.Exit(2) from None


def _words(error: Exception) -> str:
    """What the error says. To what the system says, which our own errors do not need, is added what
    to do."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    if not error.filename:
        return error.strerror
    path = Path(error.filename)
    if isinstance(error, NotADirectoryError):
        file = next((one for one in path.parents if one.is_file()), path)
        return f"{file} is a file, and a folder is needed to hold {path.name}. Give a folder."
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, and a file is needed. Give a file."
    if isinstance(error, FileNotFoundError):
        return f"there is no {path}. Give the name of what is there."
    return f"{path}: {error.strerror}"
