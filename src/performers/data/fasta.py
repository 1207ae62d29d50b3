"""Proteins from FASTA files, plain or gzipped. Errors name the file and the line of each defect."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from performers.data.vocabulary import LEGAL_LETTERS

__all__ = ["FastaRecord", "distinct_records", "read_fasta"]

_GZIP_MAGIC = b"\x1f\x8b"
# Of a sequence as written: some letters of other alphabets become legal ones in upper case.
_ILLEGAL = re.compile(f"[^{LEGAL_LETTERS}{LEGAL_LETTERS.lower()}]")


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

    headers: list[int] = []
    found_any = False
    with _open_text(path) as handle:
        for title, letters in SimpleFastaParser(_checked_lines(path, handle, headers)):
            # The parser has already read the next header; the oldest in the queue is that of this
            # record.
            header_line = headers.pop(0)
            found_any = True
            identifier, _, description = title.partition(" ")
            sequence = letters.removesuffix("*")
            where = f"{path}, line {header_line}"
            if not identifier:
                raise ValueError(
                    f"{where}: a record needs a name: write '>name', got {title!r} after '>'."
                )
            if not sequence:
                raise ValueError(
                    f"{where}: a record needs a sequence, {identifier!r} has none. Remove the "
                    "record or repair the file."
                )
            if illegal := _ILLEGAL.search(sequence):
                line = _line_of_letter(path, header_line, illegal.start())
                raise ValueError(
                    f"{path}, line {line}: {illegal.group()!r} in {identifier!r} is no amino acid. "
                    f"Proteins are written with {LEGAL_LETTERS}; write X for an unknown one."
                )
            yield FastaRecord(identifier, description.strip(), sequence.upper())
    if not found_any:
        raise ValueError(
            f"{path}: the file is empty. Give a FASTA file: '>name' lines, each with a sequence."
        )


def _open_text(path: Path) -> TextIOWrapper:
    with path.open("rb") as file:
        is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        is_empty = file.seek(0, 2) == 0
    if path.suffix == ".gz" and not is_gzip and not is_empty:
        raise ValueError(
            f"{path}: the name ends in .gz but the file is not gzipped. Rename it, or compress it "
            "with gzip."
        )
    opener = gzip.open if is_gzip else open
    # A description in another encoding does no harm. In a sequence, the replacement sign is
    # rejected as an illegal letter.
    return opener(path, "rt", encoding="utf-8-sig", errors="replace")


def _checked_lines(path: Path, handle: TextIOWrapper, headers: list[int]) -> Iterator[str]:
    """The lines of a file for the parser; appends the number of each header line to `headers`."""
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
            headers.append(number)
        elif not headers and line.strip():
            raise ValueError(
                f"{path}, line {number}: not FASTA: the first line must start with '>', got "
                f"{line[:40].rstrip()!r}. Give FASTA or FASTA.gz files of proteins."
            )
        yield line


def _line_of_letter(path: Path, header_line: int, index: int) -> int:
    """The line that holds letter `index` of the record whose header is on the given line."""
    with _open_text(path) as handle:
        for number, line in enumerate(islice(handle, header_line, None), start=header_line + 1):
            index -= len("".join(line.split()))
            if index < 0:
                return number
    raise AssertionError(f"{path} changed while it was read")
