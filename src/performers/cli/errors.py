"""What a user sees when something cannot be done: one line, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

__all__ = ["one_line_errors"]


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn the errors that a caller can cause into one line on stderr, and `more` kinds with them.

    It goes around the checks that come before long work and not around the work itself: what goes
    wrong there is our mistake, and its traceback is wanted.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError, *more) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
