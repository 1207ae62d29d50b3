import gzip
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from performers.data import AMINO_ACIDS, FastaRecord, read_fasta


@pytest.fixture
def write(tmp_path):
    """A function that writes a file and returns its path."""

    def write(content, name="proteins.fasta"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


TWO = ">sp|P1|ONE_X First protein OS=Some thing\nMKV\nLL\n\n>two\nACDE\n"
TWO_RECORDS = [
    FastaRecord("sp|P1|ONE_X", "First protein OS=Some thing", "MKVLL"),
    FastaRecord("two", "", "ACDE"),
]

records = st.lists(
    st.tuples(
        st.text("abcXYZ|_>019", min_size=1, max_size=13),
        st.text(AMINO_ACIDS, min_size=1, max_size=59),
        st.integers(1, 23),
    ),
    min_size=1,
    max_size=7,
)


@given(records)
def test_records_come_back_whatever_the_line_width(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_text(
        "".join(
            f">{name}\n" + "".join(f"{s[i : i + width]}\n" for i in range(0, len(s), width))
            for name, s, width in records
        )
    )
    assert [(r.identifier, r.sequence) for r in read_fasta(path)] == [r[:2] for r in records]


def test_gzip_is_known_by_content_not_by_name(write):
    packed = gzip.compress(TWO.encode())
    assert list(read_fasta(write(packed, "proteins.fasta.gz"))) == TWO_RECORDS
    assert list(read_fasta(write(packed, "proteins.fasta"))) == TWO_RECORDS


def test_many_files_are_read_in_order(write):
    first, second = write(TWO, "b.fasta"), write(">three\nWY\n", "a.fasta")
    identifiers = [record.identifier for record in read_fasta([first, str(second)])]
    assert identifiers == ["sp|P1|ONE_X", "two", "three"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_case_stops_blanks_and_line_ends_do_not_matter(write, newline):
    text = newline.join(["", ">one", "mk v", "Lw*", ""])
    assert list(read_fasta(write(text))) == [FastaRecord("one", "", "MKVLW")]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(write, content):
    with pytest.raises(ValueError, match=r"proteins\.fasta: the file is empty\. Give a FASTA file"):
        list(read_fasta(write(content)))


def test_an_empty_file_named_gz_is_called_empty(write):
    with pytest.raises(ValueError, match="the file is empty"):
        list(read_fasta(write("", "proteins.fasta.gz")))


def test_an_empty_gzip_is_called_empty(write):
    with pytest.raises(ValueError, match="the file is empty"):
        list(read_fasta(write(gzip.compress(b""), "proteins.fasta.gz")))


@pytest.mark.parametrize("content", [b"MKVLL\n", b"\nid,sequence\n1,MK\n", b"\x00\x01\xff\xfe"])
def test_what_is_not_fasta_is_refused_with_its_line(write, content):
    line = content.count(b"\n", 0, 1) + 1
    with pytest.raises(ValueError, match=rf"line {line}: not FASTA: .* must start with '>'"):
        list(read_fasta(write(content)))


def test_gz_that_is_not_gzip_is_refused(write):
    with pytest.raises(ValueError, match=r"the name ends in \.gz but the file is not gzipped"):
        list(read_fasta(write(TWO, "proteins.fasta.gz")))


def test_a_truncated_gzip_is_refused_with_the_line_it_reached(write):
    text = "".join(f">protein_{i}\n{'ACDEFGHIKLMNPQRSTVWY' * (i % 7 + 1)}\n" for i in range(9973))
    packed = gzip.compress(text.encode())
    path = write(packed[: len(packed) // 2], "proteins.fasta.gz")
    with pytest.raises(ValueError, match=r"after line [1-9]\d+: the gzip data is truncated"):
        list(read_fasta(path))


def test_a_damaged_gzip_is_refused(write):
    packed = bytearray(gzip.compress(TWO.encode() * 101))
    packed[len(packed) // 2] ^= 0xFF
    with pytest.raises(ValueError, match="gzip data is truncated or damaged"):
        list(read_fasta(write(bytes(packed), "proteins.fasta.gz")))


@pytest.mark.parametrize("text", [">one\nMK\n>two\n>three\nMK\n", ">one\nMK\n>two\n*\n>x\nMK\n"])
def test_a_record_without_sequence_is_refused_with_its_line(write, text):
    with pytest.raises(ValueError, match="line 3: a record needs a sequence, 'two' has none"):
        list(read_fasta(write(text)))


def test_a_record_without_sequence_at_the_end_is_refused(write):
    with pytest.raises(ValueError, match="line 3: a record needs a sequence, 'two' has none"):
        list(read_fasta(write(">one\nMK\n>two\n")))


def test_a_record_without_name_is_refused_with_its_line(write):
    with pytest.raises(ValueError, match="line 3: a record needs a name"):
        list(read_fasta(write(">one\nMK\n> two\nMK\n")))


@pytest.mark.parametrize("letter", ["1", "*", "-", "é", "\x00", "ß", "ﬁ", "ſ", "ı"])
def test_an_illegal_letter_is_named_with_its_line(write, letter):
    path = write(f">one\nMKV\n\n>two\nMKV\nL L\nVV{letter}K\nMM\n>three\nMK\n")
    with pytest.raises(ValueError, match=r"line 7: .* in 'two' is no amino acid") as error:
        list(read_fasta(path))
    assert repr(letter) in str(error.value)


def test_good_records_before_a_bad_one_are_yielded(write):
    reader = read_fasta(write(TWO + ">bad\nM1\n"))
    assert [next(reader), next(reader)] == TWO_RECORDS
    with pytest.raises(ValueError, match="line 8: '1' in 'bad'"):
        next(reader)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.fasta"):
        list(read_fasta(tmp_path / "nowhere.fasta"))


def test_without_biopython_the_error_says_what_to_install(fresh_python):
    code = """
from performers.data import load_proteins
try:
    load_proteins()
except ModuleNotFoundError as error:
    print(error)
"""
    assert 'pip install "performers[bio]"' in fresh_python(code, blocked=["Bio"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_pipe_is_read_as_a_file_is(tmp_path, packed):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    data = gzip.compress(TWO.encode()) if packed else TWO.encode()
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert list(read_fasta(pipe)) == TWO_RECORDS
    writer.join()


@pytest.mark.parametrize("rest", ["", "MK1"])
def test_a_long_name_is_not_repeated_whole(write, rest):
    path = write(f">{'A' * 10**6}\n{rest}\n")
    with pytest.raises(ValueError, match=r"line \d") as raised:
        list(read_fasta(path))
    assert len(str(raised.value)) < 500


def test_a_tab_among_the_letters_is_found_in_its_line(write):
    path = write(">a\nMKV\nM\tK\n")
    with pytest.raises(ValueError, match=r"line 3: '\\t' in 'a' is no amino acid"):
        list(read_fasta(path))


def test_a_folder_is_no_fasta(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder\. Give the files"):
        list(read_fasta(tmp_path))
