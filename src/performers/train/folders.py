"""The folder that a run or a conversion writes: that it can be made, and that it has one writer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

__all__ = ["check_file", "check_place", "claim", "holds_nothing", "release"]

CLAIM = ".writer"

# The open files whose locks this process holds, by folder. A lock ends with its process, however
# that ends, so none is ever left behind.
_claimed: dict[Path, IO[str]] = {}


def check_place(folder: Path) -> None:
    """Raise FileExistsError where a file is in the place of the folder, or of one above it, and
    PermissionError where the first folder that there is may not be written to.
    """
    for place in (folder, *folder.parents):
        if os.path.lexists(place) and not place.is_dir():
            raise FileExistsError(
                f"the output {folder} must be a folder, and {place} is a file. Choose another with "
                "--output."
            )
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"the output {folder} must be where this user may write, and {there} is not. Choose "
            "another with --output."
        )


def check_file(output: Path) -> None:
    """Raise IsADirectoryError where the file to write is a folder, and as `check_place` does for
    the folder that it is to be in.
    """
    if output.is_dir():
        raise IsADirectoryError(
            f"the output {output} must be a file, and is a folder. Name a file in it with --output."
        )
    check_place(output.parent)


def holds_nothing(folder: Path) -> bool:
    """True if there is no such folder, or only the claim of a writer in it."""
    return not folder.exists() or all(path.name == CLAIM for path in folder.iterdir())


def claim(folder: Path) -> None:
    """Make the folder, for this process to write to until it ends.

    Raises FileExistsError where another process writes to it. Windows, which has no such locks, is
    taken at its word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32" or folder.resolve() in _claimed:
        return
    import fcntl

    file = (folder / CLAIM).open("w", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise FileExistsError(
            f"another process writes to {folder}. Wait for its end, or choose another folder with "
            "--output."
        ) from error
    _claimed[folder.resolve()] = file


def release(folder: Path) -> None:
    """What this process has claimed is finished: nothing of the claim stays in the folder."""
    file = _claimed.pop(folder.resolve(), None)
    if file is not None:
        (folder / CLAIM).unlink()
        file.close()
