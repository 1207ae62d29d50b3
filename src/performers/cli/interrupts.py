"""How a command is interrupted: with one line that says how to go on, and exit code 130."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import typer

__all__ = ["saying_how_to_resume", "saying_when_interrupted"]


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
        _close_bars()
        typer.echo(f"\nInterrupted. {message}", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _close_bars() -> None:
    """End the bars of the work that is given up, which would be drawn once more after the message
    when they are collected.
    """
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
