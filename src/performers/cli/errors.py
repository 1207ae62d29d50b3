"""How a command fails: with one line for the user, and exit code 2."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

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
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # raised by the system, not by us
            named = f"{error.filename}: " if error.filename else ""
            message = f"{named}{error.strerror}"
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from None
