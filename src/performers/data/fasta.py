"""Proteins from FASTA files, plain or gzipped. Errors name the file and the line of each defect."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from performers.checks import described
from performers.data.vocabulary import LEGAL_LETTERS

__all__ = ["FastaRecord", "distinct_records", "read_fasta"]

_GZIP_MAGIC = b"\x1f\x8b"
# Of a sequence as written: some letters of other alphabets become legal ones in upper case.
_ILLEGAL = re.compile(f"[^{LEGAL_LETTERS}{LEGAL_LETTERS.lower()}]")


class _Line(NamedTuple):
    number: int
    letters: int


class FastaRecord(NamedTuple):
    """One entry: `>identifier description`, then the sequence in upper case."""

    identifier: str
    description: str
    sequence: str


def read_fasta(paths: str | Path | Iterable[str | Path]) -> Iterator[FastaRecord]:
    """Yield the records of one or many FASTA files, in order.

    A gzipped file is known by its first bytes, whatever its name. Lower case (soft masking) becomes
    upper case; the `*` that ends a translation is dropped.

    Raises, with file and line:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, is not FASTA, is a damaged gzip, or is named .gz without
            being one; a record has no name, no sequence or a letter outside the vocabulary.
        ModuleNotFoundError: Biopython is not installed.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    for path in map(Path, paths):
        yield from _read_file(path)


def distinct_records(records: Iterable[FastaRecord]) -> list[FastaRecord]:
    """The records without repeated sequences: of each sequence the first record."""
    first: dict[str, FastaRecord] = {}
    for record in records:
        first.setdefault(record.sequence, record)
    return list(first.values())


def _read_file(path: Path) -> Iterator[FastaRecord]:
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading FASTA needs Biopython. Install it with pip install "performers[bio]".'
        ) from error

    records: list[list[_Line]] = []
    found_any = False
    with _open_text(path) as handle:
        for title, letters in SimpleFastaParser(_checked_lines(path, handle, records)):
            # The parser has already read the next header; the oldest in the queue is this record.
            (header_line, _), *lines = records.pop(0)
            found_any = True
            identifier, _, description = title.partition(" ")
            sequence = letters.removesuffix("*")
            where = f"{path}, line {header_line}"
            if not identifier:
                raise ValueError(
                    f"{where}: a record needs a name: write '>name', got {described(title)} after "
                    "'>'."
                )
            if not sequence:
                raise ValueError(
                    f"{where}: a record needs a sequence, {described(identifier)} has none. Remove "
                    "the record or repair the file."
                )
            if illegal := _ILLEGAL.search(sequence):
                line = _line_of_letter(lines, illegal.start())
                raise ValueError(
                    f"{path}, line {line}: {illegal.group()!r} in {described(identifier)} is no "
                    f"amino acid. Proteins are written with {LEGAL_LETTERS}; write X for an "
                    "unknown one."
                )
            yield FastaRecord(identifier, description.strip(), sequence.upper())
    if not found_any:
        raise ValueError(
            f"{path}: the file is empty. Give a FASTA file: '>name' lines, each with a sequence."
        )


@contextmanager
def _open_text(path: Path) -> Iterator[TextIOWrapper]:
    """The text of a file, which may be a pipe: it is read once, from its beginning to its end."""
    if not path.exists():
        raise FileNotFoundError(f"there is no FASTA file {path}. Give the path of one.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the FASTA files that are in it.")
    with path.open("rb") as file:
        is_gzip = file.peek(len(_GZIP_MAGIC)).startswith(_GZIP_MAGIC)
        if path.suffix == ".gz" and not is_gzip and file.peek(1):
            raise ValueError(
                f"{path}: the name ends in .gz but the file is not gzipped. Rename it, or compress "
                "it with gzip."
            )
        source = gzip.GzipFile(fileobj=file) if is_gzip else file
        # A description in another encoding does no harm. In a sequence, the replacement sign is
        # rejected as an illegal letter.
        with TextIOWrapper(source, encoding="utf-8-sig", errors="replace") as text:
            yield text


def _checked_lines(path: Path, handle: TextIOWrapper, records: list[list[_Line]]) -> Iterator[str]:
    """The lines of a file for the parser; appends each to those of its record in `records`, whose
    first is its header.
    """
    number = 0
    while True:
        try:
            line = handle.readline()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}, after line {number}: the gzip data is truncated or damaged ({error}). "
                "Copy or download the file again."
            ) from error
        if not line:
            return
        number += 1
        if line.startswith(">"):
            records.append([_Line(number, 0)])
        elif records:
            # The letters as the parser counts them.
            letters = line.rstrip().replace(" ", "").replace("\r", "")
            records[-1].append(_Line(number, len(letters)))
        elif line.strip():
            raise ValueError(
                f"{path}, line {number}: not FASTA: the first line must start with '>', got "
                f"{line[:40].rstrip()!r}. Give FASTA or FASTA.gz files of proteins."
            )
        yield line


def _line_of_letter(lines: list[_Line], index: int) -> int:
    """The line that holds letter `index` of a record with these lines."""
    for number, letters in lines:
        index -= letters
        if index < 0:
            return number
    raise AssertionError("the letters of a record are those of its lines")
