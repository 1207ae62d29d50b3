"""Any bytes are read as the FASTA that they are, or refused with the line of the defect."""

import gzip
import re
import zlib

from hypothesis import given
from hypothesis import strategies as st
from refusals import Refusal, few, outcome

from performers.data import FastaRecord, read_fasta

LETTERS = set("ACDEFGHIKLMNPQRSTVWYBOUXZJ")

lines = st.one_of(
    st.text("ACDEFGHIKLMNPQRSTVWYbouxzj", max_size=11),
    st.text("MKV* \t>.-", max_size=7),
    st.builds(">{} {}".format, st.text(min_size=1, max_size=5), st.text(max_size=5)),
    st.sampled_from([">", ">a", "> b", "", " ", "MKV*", "ß", "ſ", "ı", "\x00", "\ufeff", ";note"]),
)
texts = st.tuples(st.lists(lines, max_size=9), st.sampled_from(["\n", "\r\n", "\r"])).map(
    lambda parts: parts[1].join(parts[0])
)
fasta = st.one_of(
    texts.map(lambda text: text.encode("utf-8", errors="surrogatepass")),
    st.lists(st.sampled_from([">a\nMKV\n", ">b c\nLLK\nAA\n", ">d\nMK\n"]), max_size=5).map(
        lambda records: "".join(records).encode()
    ),
    st.binary(max_size=41),
)


@st.composite
def files(draw):
    """Bytes, perhaps gzipped, and then perhaps cut short or with one byte changed."""
    data = draw(fasta)
    if draw(st.booleans()):
        data = gzip.compress(data, mtime=0)
    damage = draw(st.sampled_from(["none", "none", "cut", "change"]))
    if damage != "none" and data:
        place = draw(st.integers(0, len(data) - 1))
        changed = bytes([draw(st.integers(0, 255))]) + data[place + 1 :]
        data = data[:place] + (changed if damage == "change" else b"")
    return data


def records_of(data):
    """The records of a file by the words of `read_fasta`; None if there is a defect."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return None
    text = re.sub("\r\n?", "\n", data.decode("utf-8-sig", errors="replace"))
    before, *entries = re.split("^>", text, flags=re.MULTILINE)
    if before.strip() or not entries:
        return None
    records = []
    for entry in entries:
        title, _, body = entry.partition("\n")
        name, _, description = title.rstrip().partition(" ")
        sequence = "".join(line.rstrip() for line in body.split("\n")).replace(" ", "")
        sequence = sequence.removesuffix("*")
        if not name or not sequence or not set(sequence) <= LETTERS | {c.lower() for c in LETTERS}:
            return None
        records.append(FastaRecord(name, description.strip(), sequence.upper()))
    return records


@few
@given(files())
def test_a_file_is_read_by_its_definition_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    path.write_bytes(data)
    found, expected = outcome(lambda: list(read_fasta(path))), records_of(data)
    if expected is None:
        assert isinstance(found, Refusal)
        assert found.words.startswith(str(path))
    else:
        assert found == expected
