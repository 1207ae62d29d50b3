"""Files of a run: written in one step, and read with the thought that they may be damaged since."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

__all__ = ["UnsavedError", "holding", "read_json", "read_text", "replace_text", "writing"]

# What is left to do after what kept a file from being written is mended.
AGAIN = "give the command again."

# Errors about a place. All others are taken for those of a disk, which libraries word as they like.
MISPLACED = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)


# What is raised where a file is taken for what it does not hold.
FAULTS = (LookupError, TypeError, AttributeError, ValueError, EOFError, BadZipFile)


class DamagedFileError(ValueError):
    """A file does not hold what it must; the message names it."""


class UnsavedError(OSError):
    """What was to be kept could not be written, for example because the disk is full."""


@contextmanager
def writing(
    path: Path, then: str = AGAIN, kinds: tuple[type[Exception], ...] = (OSError,)
) -> Iterator[None]:
    """Where `path` is written: an error names it, and says what to mend and what to do `then`.

    The system names no file when a disk is full. `kinds`: what a library raises where it is.

    Raises UnsavedError.
    """
    try:
        yield
    except UnsavedError:
        raise
    except kinds as error:
        if isinstance(error, MISPLACED):
            remedy = "Mend that"
        else:
            place = next((one for one in (path, *path.parents) if one.is_dir()), Path())
            free = shutil.disk_usage(place).free
            remedy = f"The disk has {free / 2**20:,.0f} MiB free: make room"
        raise UnsavedError(f"{path} could not be written: {error}. {remedy}, and {then}") from error


def replace_text(path: Path, text: str, then: str = AGAIN) -> None:
    """Write so that a kill at any moment leaves the old file or the new one, never a part.

    Raises UnsavedError; `then` is that of `writing`.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path, then):
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    except UnsavedError:
        with suppress(OSError):  # what keeps a file from being written may keep it from being there
            partial.unlink()
        raise


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. `remedy`: a sentence, what to do about a file that has none.

    Raises FileNotFoundError, and DamagedFileError.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise DamagedFileError(
            f"{path} must be a JSON file, and is damaged: {error}. {remedy}"
        ) from error
    if not isinstance(tree, dict):
        raise DamagedFileError(
            f"{path} must hold a JSON object, got {type(tree).__name__}. {remedy}"
        )
    return tree


@contextmanager
def holding(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Where it is used what a file holds: that it holds something else is said of the file.

        with holding(path, "the numbers of a run", remedy="Delete it."): ...

    Raises DamagedFileError, that of another file as it is.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except FAULTS as error:
        raise DamagedFileError(
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
