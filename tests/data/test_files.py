"""A file is read as what its name or its reader says: one text, or records in order, each once."""

import gzip
import json

import pytest
from datasets import Dataset

from performers.data import read_texts

TEXTS = ["to be", "or not", "that is"]
PAIRS = [("to be", "yes"), ("or not", "no"), ("that is", "yes")]


def written(folder, name):
    """Three records in a file of this name."""
    path = folder / name
    kind = path.suffix
    rows = [{"number": i, "text": a, "answer": b} for i, (a, b) in enumerate(PAIRS)]
    if kind == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        separator = {".csv": ",", ".tsv": "\t"}[kind]
        lines = [separator.join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([separator.join(rows[0]), *lines]) + "\n")
    return path


def test_a_text_is_one_text(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("to be\n\nor not\n", encoding="utf-8")
    assert read_texts(path) == "to be\n\nor not\n"
    assert read_texts(path, "lines") == [("to be",), ("or not",)]


def test_sequences_of_a_fasta_file_are_records(tmp_path):
    text = ">a first\nMKV\nLA\n>b\nmkvv\n>c\nMKVLA\n"
    plain, zipped = tmp_path / "set.fasta", tmp_path / "set.fa.gz"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    # in capitals, and what was there before is left out
    assert read_texts(plain) == read_texts(zipped) == [("MKVLA",), ("MKVV",)]


@pytest.mark.parametrize("name", ["set.jsonl", "set.csv", "set.tsv", "set.parquet"])
def test_rows_of_a_table_are_records_by_column(name, tmp_path, capfd):
    path = written(tmp_path, name)
    capfd.readouterr()
    assert read_texts(path, columns=["text"]) == [(text,) for text in TEXTS]
    assert read_texts(path, columns=["text", "answer"]) == PAIRS
    assert read_texts(path, columns=["answer"]) == [("yes",), ("no",)]
    assert capfd.readouterr() == ("", "")


def test_the_only_column_of_text_needs_no_name(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("number,text\n1,to be\n2,or not\n")
    assert read_texts(path) == [("to be",), ("or not",)]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("name", "content", "kind", "columns", "words"),
    [
        ("a.txt", "to be", "jsn", (), "unknown format 'jsn'.*Did you mean 'json'"),
        ("a.txt", "to be", None, ("a",), "is read as text, got column a"),
        ("a.txt", " \n\n", "lines", (), "must hold a record: read as lines, it has none"),
        ("a.csv", "a,b\nx,y\n", None, (), "has text in a, b. Choose one, or two, with --column"),
        ("a.csv", "a,b\nx,y\n", None, ("c",), "got c, and .* has text in a, b"),
        ("a.csv", "a,b,c\nx,y,z\n", None, ("a", "b", "c"), "got a, b, c, and"),
        ("a.csv", "a,b\n1,2\n", None, (), "got no column, and .* has text in no column"),
        ("a.csv", "a,b\n1,x\n", None, ("a",), "got a, and .* has text in b"),
        ("a.csv", "a,b\nx,y\nu,\n", None, ("a", "b"), "row 1 of .* has none in b"),
        ("a.jsonl", "{", None, (), "must be json, and cannot be read"),
        ("a.parquet", "PAR", None, (), "must be parquet, and cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_is_needed(
    name, content, kind, columns, words, tmp_path
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_texts(tmp_path / name, kind, columns)


@pytest.mark.parametrize("name", ["a.txt", "a.fasta", "a.csv"])
def test_a_file_that_is_not_there_is_said(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=name):
        read_texts(tmp_path / name)
