"""What several experiments need: books, and a folder from which a long one can resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.data.books import AMERICAN, AUSTEN, SPURGEON
from performers.data.fetch import read_package
from performers.reproduction.protocol import EXPERIMENTS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["read_texts", "resumable_folder"]


def read_texts(name: str, report: Callable[[str], None]) -> tuple[dict[str, str], dict[str, Any]]:
    """Books by their titles, and where they are from.

    "novels" downloads those of Jane Austen, a Debian package, "books" all of
    `performers.data.books`. "excerpts" are in the repository.
    """
    if name == "excerpts":
        files = sorted((EXPERIMENTS / "sharp-minilm").glob("*.txt"))
        return {path.stem: path.read_text(encoding="utf-8") for path in files}, {}
    if name == "novels":
        return read_package(AUSTEN, report=report)
    books: dict[str, str] = {}
    origins = []
    for package in (AUSTEN, AMERICAN, SPURGEON):
        texts, origin = read_package(package, report=report)
        books |= texts
        origins.append(origin)
    return books, {"packages": origins}


@contextmanager
def resumable_folder(name: str, config: DataclassInstance) -> Iterator[Path]:
    """A folder under runs/ for checkpoints, which the same experiment finds again if interrupted.

    It belongs to this config alone, and is removed when the block ends without an error: a later
    run starts anew.
    """
    digest = sha256(repr(config).encode()).hexdigest()[:8]
    folder = Path("runs", f"{name}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
