"""Texts as they come: one running text, or records, each of which is a sequence by itself.

novel.txt                     a running text
reviews.txt, as "lines"       a record per line
proteins.fasta.gz             a record per sequence
pairs.jsonl, .csv, .parquet   a record per row, from a column or from two
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performers.checks import check_choice
from performers.data.fasta import read_fasta
from performers.records.files import read_text

__all__ = ["FORMATS", "TEXT", "Record", "read_texts"]

TEXT, LINES, FASTA, JSON, CSV, PARQUET = "text", "lines", "fasta", "json", "csv", "parquet"
FORMATS = (TEXT, LINES, FASTA, JSON, CSV, PARQUET)
TABLES = (JSON, CSV, PARQUET)

# What a file is called that holds each of them; every other file is a running text.
SUFFIXES = {
    **dict.fromkeys((".fasta", ".fa", ".faa"), FASTA),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), JSON),
    **dict.fromkeys((".csv", ".tsv"), CSV),
    ".parquet": PARQUET,
}

# A text, or two that belong together, such as a question and its answer.
Record = tuple[str, ...]


def read_texts(
    path: str | Path, kind: str | None = None, columns: Sequence[str] = ()
) -> str | list[Record]:
    """A running text, or the records of a file, without those that repeat an earlier one.

    `kind`: one of `FORMATS`; None: what the suffix says, with or without .gz.
    `columns`: of a table, one, or two for pairs. None: the only column that holds text.

    Raises ValueError for columns that are not there or hold no text, for files without a record and
    for those that cannot be read as what they are called, OSError for a file that is not there, and
    ModuleNotFoundError for tables without the package datasets.
    """
    path = Path(path)
    if kind is None:
        kind = SUFFIXES.get(path.with_suffix("" if path.suffix == ".gz" else path.suffix).suffix)
        kind = kind or TEXT
    check_choice("format", kind, FORMATS)
    if columns and kind not in TABLES:
        raise ValueError(
            f"columns are those of a table, {', '.join(TABLES)}: {path} is read as {kind}, got "
            f"column {', '.join(columns)}. Leave them out, or say which format it is."
        )
    if kind == TEXT:
        return read_text(path)
    if kind == LINES:
        lines = read_text(path).splitlines()
        records: list[Record] = [(line.strip(),) for line in lines if line.strip()]
    elif kind == FASTA:
        records = [(record.sequence,) for record in read_fasta(path)]
    else:
        records = _rows(path, kind, columns)
    if not records:
        raise ValueError(f"{path} must hold a record: read as {kind}, it has none.")
    return list(dict.fromkeys(records))


def _rows(path: Path, kind: str, columns: Sequence[str]) -> list[Record]:
    try:
        from datasets import (
            Dataset,
            Value,
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
        from datasets.exceptions import DatasetGenerationError
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {kind} needs datasets. Install it with: pip install 'performers[hf]'."
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    readers: dict[str, Any] = {
        JSON: Dataset.from_json,
        CSV: Dataset.from_csv,
        PARQUET: Dataset.from_parquet,
    }
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    # Its own cache would keep a copy of each file that was ever read.
    with tempfile.TemporaryDirectory() as cache:
        try:
            table = readers[kind](str(path), cache_dir=cache, keep_in_memory=True, **options)
        except (DatasetGenerationError, ValueError) as error:
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{path} must be {kind}, and cannot be read: {cause}") from error
        finally:
            if not were_disabled:
                enable_progress_bars()
        texts = [
            name
            for name, feature in table.features.items()
            if isinstance(feature, Value) and feature.dtype in ("string", "large_string")
        ]
        chosen = list(columns) or texts
        if len(chosen) > 2 or not set(chosen) <= set(texts) or len(chosen) != (len(columns) or 1):
            raise ValueError(
                "a record is the text of one column, or a pair of two: got "
                f"{', '.join(columns) or 'no column'}, and {path} has text in "
                f"{', '.join(texts) or 'no column'}. Choose one, or two, with --column."
            )
        rows = list(zip(*(table[name] for name in chosen), strict=True))
    for number, row in enumerate(rows):
        if not all(text and text.strip() for text in row):
            raise ValueError(
                f"every record must have text: row {number} of {path} has none in "
                f"{chosen[next(i for i, text in enumerate(row) if not (text and text.strip()))]}. "
                "Remove the row or fill it in."
            )
    return rows
