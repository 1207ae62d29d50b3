"""How a command fails (with one line for the user, and exit code 2), or is interrupted."""

from __future__ import annotations

import shlex
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import typer

from performers.cli.answers import is_verbose

__all__ = ["MISTAKES", "one_line_errors", "saying_how_to_resume", "saying_when_interrupted"]

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


def saying_how_to_resume(
    command: Sequence[str], kept: str = "checkpoint"
) -> AbstractContextManager[None]:
    """`saying_when_interrupted` what resumes the work: this command with --resume."""
    again = shlex.join([*command, "--resume"])
    return saying_when_interrupted(f"Every whole {kept} is kept; go on with: {again}")


@contextmanager
def saying_when_interrupted(message: str) -> Iterator[None]:
    """End with this message and exit code 130 if the user interrupts the work, or a system asks it
    to end (SIGTERM, which schedulers send, and torchrun when another process has ended).
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {message}", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
