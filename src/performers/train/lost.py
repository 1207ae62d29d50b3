"""What the other processes of a run say when one of them is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState
from torch.distributed import DistError

__all__ = ["LostProcessError", "naming_lost_processes"]


class LostProcessError(RuntimeError):
    """Another process of a run has ended, or cannot be reached."""


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Raises LostProcessError where a collective operation fails."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no class of errors of its own.
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        state = PartialState()
        raise LostProcessError(
            f"another process of this run has ended or cannot be reached: process "
            f"{state.process_index} of {state.num_processes} waited for it and got: {error}. What "
            "it says itself stands above or in its own log. Every whole checkpoint is kept: go on "
            "with --resume."
        ) from error
