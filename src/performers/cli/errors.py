"""How a command fails (with one line for the user, and exit code 2), or is interrupted."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer

__all__ = ["MISTAKES", "one_line_errors", "saying_how_to_resume"]

# What the checks before long work raise.
MISTAKES = (ValueError, TypeError, OSError, ModuleNotFoundError)


@contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = MISTAKES) -> Iterator[None]:
    """Turn errors of these kinds into one line on stderr.

    For the work itself only kinds that it raises on purpose are given: the traceback of any other
    error there is wanted.
    """
    try:
        yield
    except kinds as error:
        message = str(error)
        if isinstance(error, OSError) and error.strerror:  # raised by the system, not by us
            message = f"{error.filename}: {error.strerror}"
        typer.echo(f"error: {' '.join(message.split())}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def saying_how_to_resume(command: Sequence[str]) -> Iterator[None]:
    """If the user interrupts the work, or a system asks it to end (SIGTERM, which schedulers send,
    and torchrun when another process has ended), say what resumes it: this command with --resume.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join([*command, "--resume"])
        typer.echo(f"\nInterrupted. Every whole checkpoint is kept; go on with: {again}", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)
