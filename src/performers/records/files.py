"""Files of a run: written in one step, and read with the thought that they may be damaged since."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["holding", "read_json", "read_text", "replace_text"]


def replace_text(path: Path, text: str) -> None:
    """Write so that a kill at any moment leaves the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. `remedy`: a sentence, what to do about a file that has none.

    Raises FileNotFoundError, and ValueError that names the file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise ValueError(
            f"{path} must be a JSON file, and is damaged: {error}. {remedy}"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(tree).__name__}. {remedy}")
    return tree


@contextmanager
def holding(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Where it is used what a file holds: that it holds something else is said of the file.

        with holding(path, "the numbers of a run", remedy="Delete it."): ...

    Raises ValueError.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold {what}, and has a fault: {error!r}. {remedy}"
        ) from error


def read_text(path: Path) -> str:
    """A text of the caller's. Raises FileNotFoundError, and ValueError that names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no text file {path}. Give the path of one.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: {error}. Convert it.") from error
