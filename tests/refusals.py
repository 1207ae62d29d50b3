"""The contract of every entrance: an input is served, or refused in words of ours."""

import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis

import performers

PACKAGE = str(Path(performers.__file__).parent)

# What the package raises for an input, on purpose. All that is not of these kinds is a fault.
KINDS = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError)

# Fewer examples than the profile asks of other tests: these reach deep.
few = hypothesis.settings(max_examples=hypothesis.settings.default.max_examples // 5)


class Refusal(NamedTuple):
    """The words in which an input was refused."""

    words: str


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or the `Refusal` of its input.

    An error is ours if a `raise` of the package raised it. Others pass through and fail the test:
    those of torch, of the system and of Python, which speak of something else than the input.
    """
    try:
        return call()
    except KINDS as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(last.filename, last.lineno or 0).strip()
        if not (last.filename.startswith(PACKAGE) and line.startswith("raise")):
            raise
        words = str(error)
        assert 20 < len(words) < 2000, f"a refusal is a sentence or a few: {words!r:.3000}"
        return Refusal(words)
