"""Text files, plain or gzipped, read line by line, whole or in pieces that hold whole records.

proteins.fasta, 2 GB ──cut_files──► bytes 0 … 67108901, 67108901 … 134217790, …
proteins.fasta.gz    ──cut_files──► the whole file: gzip can be read from its beginning alone
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Piece", "cut_files", "line_in_file", "numbered_lines"]

_GZIP_MAGIC = b"\x1f\x8b"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Piece:
    """The bytes of a file from `start` to `end`, to its own end unless given.

    `number`: of the piece among all of a data set.
    """

    path: Path
    start: int = 0
    end: int | None = None
    number: int = 0


def cut_files(
    paths: Iterable[str | Path], before: bytes, piece_bytes: int = 64 << 20
) -> list[Piece]:
    """Pieces of about so many bytes, each of which begins at a line that begins with `before`.

    Little of a file is read, its size is that of now. A gzipped file is one piece, and so is what
    follows the last line that begins so.

    Raises FileNotFoundError, IsADirectoryError, and ValueError for what is no file on a disk, which
    could be read once only.
    """
    pieces: list[Piece] = []
    for path in map(Path, paths):
        _check(path)
        if not path.is_file():
            raise ValueError(
                f"{path} must be a file, because a stream is read again and again. Write what it "
                "gives to a file first."
            )
        with path.open("rb") as file:
            starts: list[int] = [0]
            size = 0 if _is_gzip(file) else path.stat().st_size
            while starts[-1] + piece_bytes < size:
                file.seek(starts[-1] + piece_bytes)
                found = _find(file, b"\n" + before)
                if found is None:
                    break
                starts.append(found + 1)
        ends = [*starts[1:], None]
        pieces += [
            Piece(path, start, end, len(pieces) + number)
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
    return pieces


def numbered_lines(piece: Piece) -> Iterator[tuple[int, str]]:
    """The lines of a piece with their ends, and their numbers in it, from 1.

    A gzipped file is known by its first bytes, whatever its name. A piece that is a whole file may
    be a pipe: it is read once, from its beginning to its end.

    Raises OSError, and ValueError for a damaged gzip or a file that is named .gz without being one.
    """
    number = 0
    _check(piece.path)
    with piece.path.open("rb") as file:
        is_gzip = _is_gzip(file)
        if piece.path.suffix == ".gz" and not is_gzip and file.peek(1):
            raise ValueError(
                f"{piece.path}: the name ends in .gz but the file is not gzipped. Rename it, or "
                "compress it with gzip."
            )
        source: BinaryIO | gzip.GzipFile | io.BufferedReader = file
        if is_gzip:
            source = gzip.GzipFile(fileobj=file)
        elif piece.start or piece.end is not None:
            source = io.BufferedReader(_Span(file, piece), _BLOCK)
        # A description in another encoding does no harm. In a sequence, the replacement sign is
        # rejected as an illegal letter.
        with io.TextIOWrapper(source, encoding="utf-8-sig", errors="replace") as text:
            while True:
                try:
                    line = text.readline()
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise ValueError(
                        f"{piece.path}, after line {number}: the gzip data is truncated or damaged "
                        f"({error}). Copy or download the file again."
                    ) from error
                if not line:
                    return
                number += 1
                yield number, line


def line_in_file(piece: Piece, number: int) -> int:
    """The number in the file of a line of a piece. It reads what comes before: for errors alone."""
    if not piece.start:
        return number
    with piece.path.open("rb") as file:
        left = piece.start
        while block := file.read(min(_BLOCK, left)):
            number += block.count(b"\n")
            left -= len(block)
    return number


class _Span(io.RawIOBase):
    """The bytes of a piece, of a file that is open."""

    def __init__(self, file: BinaryIO, piece: Piece) -> None:
        self.file = file
        self.left = (piece.path.stat().st_size if piece.end is None else piece.end) - piece.start
        file.seek(piece.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        content = self.file.read(min(len(view), self.left))
        view[: len(content)] = content
        self.left -= len(content)
        return len(content)


def _check(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}. Give the path of one.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the files that are in it.")


def _is_gzip(file: io.BufferedReader) -> bool:
    return file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)


def _find(file: BinaryIO, word: bytes) -> int | None:
    """Where `word` first begins, from the place of the file on; None if it does not come."""
    start, held = file.tell(), b""
    while block := file.read(_BLOCK):
        held += block
        found = held.find(word)
        if found >= 0:
            return start + found
        start += len(held) - len(word) + 1
        held = held[-(len(word) - 1) :] if len(word) > 1 else b""
    return None
