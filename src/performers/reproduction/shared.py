"""What several experiments need: books, and what a long one is to find again if interrupted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.data.books import AMERICAN, AUSTEN, SPURGEON
from performers.data.fetch import read_package
from performers.records import read_json
from performers.reproduction.protocol import EXPERIMENTS
from performers.train.checkpoints import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["kept", "read_texts", "resumable_folder", "seconds_before"]

SECONDS = "seconds.txt"


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
    folder = _folder(name, config)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter() - seconds_before(name, config)
    try:
        yield folder
    except BaseException:
        write_atomically(folder / SECONDS, f"{time.perf_counter() - began:.1f}\n")
        raise
    shutil.rmtree(folder)


def seconds_before(name: str, config: DataclassInstance) -> float:
    """How long an experiment ran before it was interrupted; 0 for one that was not, or killed."""
    path = _folder(name, config) / SECONDS
    return float(path.read_text(encoding="utf-8")) if path.exists() else 0.0


def _folder(name: str, config: DataclassInstance) -> Path:
    return Path("runs", f"{name}-{sha256(repr(config).encode()).hexdigest()[:8]}")


def kept(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, once: read from the file if an interrupted experiment has written it."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found))
    return read_json(path, "Delete it to measure again.")
