"""Proteins from FASTA files, plain or gzipped. Errors name the file and the line of each defect."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from performers.checks import described
from performers.data.pieces import Piece, line_in_file, numbered_lines
from performers.data.vocabulary import LEGAL_LETTERS

__all__ = ["FastaRecord", "distinct_records", "read_fasta", "read_piece"]

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
        yield from read_piece(Piece(path))


def distinct_records(records: Iterable[FastaRecord]) -> list[FastaRecord]:
    """The records without repeated sequences: of each sequence the first record."""
    first: dict[str, FastaRecord] = {}
    for record in records:
        first.setdefault(record.sequence, record)
    return list(first.values())


def read_piece(piece: Piece) -> Iterator[FastaRecord]:
    """Yield the records of a file, or of a piece of it that begins with a header: see `read_fasta`.

    Lines in errors are those of the file.
    """
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'reading FASTA needs Biopython. Install it with pip install "performers[bio]".'
        ) from error

    def place(number: int) -> str:
        return f"{piece.path}, line {line_in_file(piece, number)}"

    records: list[list[_Line]] = []
    found_any = False
    for title, letters in SimpleFastaParser(_checked_lines(piece, records)):
        # The parser has already read the next header; the oldest in the queue is this record.
        (header_line, _), *lines = records.pop(0)
        found_any = True
        identifier, _, description = title.partition(" ")
        sequence = letters.removesuffix("*")
        if not identifier:
            raise ValueError(
                f"{place(header_line)}: a record needs a name: write '>name', got "
                f"{described(title)} after '>'."
            )
        if not sequence:
            raise ValueError(
                f"{place(header_line)}: a record needs a sequence, {described(identifier)} has "
                "none. Remove the record or repair the file."
            )
        if illegal := _ILLEGAL.search(sequence):
            line = _line_of_letter(lines, illegal.start())
            raise ValueError(
                f"{place(line)}: {illegal.group()!r} in {described(identifier)} is no amino acid. "
                f"Proteins are written with {LEGAL_LETTERS}; write X for an unknown one."
            )
        yield FastaRecord(identifier, description.strip(), sequence.upper())
    if not found_any:
        raise ValueError(
            f"{piece.path}: the file is empty. Give a FASTA file: '>name' lines, each with a "
            "sequence."
        )


def _checked_lines(piece: Piece, records: list[list[_Line]]) -> Iterator[str]:
    """The lines of a piece for the parser; appends each to those of its record in `records`, whose
    first is its header.
    """
    for number, line in numbered_lines(piece):
        if line.startswith(">"):
            records.append([_Line(number, 0)])
        elif records:
            # The letters as the parser counts them.
            letters = line.rstrip().replace(" ", "").replace("\r", "")
            records[-1].append(_Line(number, len(letters)))
        elif line.strip():
            raise ValueError(
                f"{piece.path}, line {number}: not FASTA: the first line must start with '>', got "
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
