import gzip
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from performers.data import read_fasta, read_proteins
from performers.data.fetch import DebianPackage, Package, fetch_proteins, read_package

NCBI_LETTERS = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
DATABASES = {"BPO": {"P1": "MKV", "P2": "WYUX"}, "MFO": {"P2": "WYUX"}, "CCO": {"P3": "MKV"}}


@pytest.fixture
def swissprot(tmp_path):
    """A folder laid out as the package metastudent-data, with three proteins."""
    root = tmp_path / "package"
    for ontology, proteins in DATABASES.items():
        folder = root / "usr/share/metastudent-data/dataset_201401" / ontology
        folder.mkdir(parents=True)
        joined = "-" + "".join(sequence + "-" for sequence in proteins.values())
        packed = bytes(NCBI_LETTERS.index(letter) for letter in joined)
        (folder / "goasp.fasta.psq").write_bytes(packed)
        annotation = "".join(f"{name}\tGO:0000001\n" for name in proteins)
        (folder / "goasp_annot.dat").write_text(annotation)
    return root


@pytest.fixture
def examples(tmp_path):
    """A folder laid out as the package mmseqs2-examples."""
    folder = tmp_path / "package/usr/share/doc/mmseqs2/example-data"
    folder.mkdir(parents=True)
    text = ">tr|Q1|Q1_X Some protein OS=X PE=4 SV=1 Split=0 \nMKV\n"
    (folder / "DB.fasta.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path / "package"


def test_swissprot_is_read_from_its_blast_databases(swissprot, tmp_path):
    output = tmp_path / "proteins.fasta.gz"
    lines = []
    card = fetch_proteins(
        output, "swissprot", from_paths=[swissprot], clustering="kmers", report=lines.append
    )
    assert [(r.identifier, r.sequence) for r in read_fasta(output)] == [
        ("P1", "MKV"),
        ("P2", "WYUX"),
    ]
    assert card["counts"]["records"] == 3
    assert card["counts"]["duplicates"] == 1
    assert card["counts"]["residues"] == 7
    assert lines[0] == "3 proteins, 2 distinct; grouping homologues"


def test_the_card_beside_the_file_names_source_license_and_checksum(examples, tmp_path):
    output = tmp_path / "proteins.fasta.gz"
    card = fetch_proteins(output, "examples", from_paths=[examples], clustering="kmers")
    assert json.loads((tmp_path / "proteins.json").read_text()) == card
    assert card["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert card["source"]["package"] == "mmseqs2-examples"
    assert "UniProt" in card["source"]["license"]
    assert "CC BY 4.0" in card["source"]["license"]
    [protein] = read_proteins(output)[0]
    assert protein.description == "Some protein OS=X PE=4 SV=1"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_deb_file_is_unpacked_and_its_version_noted(examples, tmp_path):
    (examples / "DEBIAN").mkdir()
    (examples / "DEBIAN/control").write_text(
        "Package: mmseqs2-examples\nVersion: 14-test\nArchitecture: all\n"
        "Maintainer: Nobody <nobody@example.org>\nDescription: test\n"
    )
    package = tmp_path / "examples.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(examples), str(package)]
    subprocess.run(command, check=True, capture_output=True)
    output = tmp_path / "proteins.fasta.gz"
    card = fetch_proteins(output, "examples", from_paths=[package], clustering="kmers")
    assert card["source"]["version"] == "14-test"
    assert card["source"]["package_sha256"] == hashlib.sha256(package.read_bytes()).hexdigest()
    assert card["counts"]["proteins"] == 1


def test_the_same_proteins_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    seconds = itertools.count(1e9)
    monkeypatch.setattr("time.time", lambda: next(seconds))
    source = tmp_path / "mine.fasta"
    source.write_text(">a first\nMKV\n>b\nWYW\n")
    outputs = [tmp_path / "one.fasta.gz", tmp_path / "two.fasta.gz"]
    for output in outputs:
        card = fetch_proteins(output, "fasta", from_paths=[source], clustering="kmers")
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert card["source"]["files"] == {
        "mine.fasta": hashlib.sha256(source.read_bytes()).hexdigest()
    }


# `apt-get`, of which a download goes on where it stopped; it breaks off after half of the file
# unless a part is there.
APT = """#!/bin/sh
if [ "$2" = --print-uris ]; then
    echo "'http://x/data.deb' data.deb 10 SHA256:{sha256}"
elif [ -e data.deb ]; then
    tail --bytes=+6 {source} >> data.deb
else
    head --bytes=5 {source} > data.deb
    echo "connection lost" >&2
    exit 100
fi
"""


@pytest.fixture
def apt(tmp_path, monkeypatch):
    """A function that makes `apt-get` serve ten bytes under a checksum."""

    def serve(content, sha256):
        (tmp_path / "source").write_bytes(content)
        program = tmp_path / "apt-get"
        program.write_text(APT.format(source=tmp_path / "source", sha256=sha256))
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return serve


class Whole(DebianPackage):
    """Its file is what it holds."""

    def unpack(self, path, folder):
        folder.mkdir()
        shutil.copy(path, folder / "content")
        return "1"


def test_a_download_that_broke_off_goes_on_where_it_stopped(apt, tmp_path):
    apt(b"0123456789", hashlib.sha256(b"0123456789").hexdigest())
    package = Whole("data", "none", lambda folder: (folder / "content").read_bytes())
    with pytest.raises(RuntimeError, match="failed with status 100: connection lost"):
        read_package(package, report=lambda line: None)
    part = tmp_path / "cache/performers/downloads/data/data.deb"
    assert part.read_bytes() == b"01234"
    content, origin = read_package(package, report=lambda line: None)
    assert content == b"0123456789"
    assert origin["package_sha256"] == hashlib.sha256(content).hexdigest()
    assert not part.exists()


def test_a_download_with_another_checksum_is_refused_and_removed(apt, tmp_path):
    apt(b"0123456789", hashlib.sha256(b"012345678X").hexdigest())
    part = tmp_path / "cache/performers/downloads/data/data.deb"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"01234")
    package = Whole("data", "none", lambda folder: None)
    with pytest.raises(RuntimeError, match=r"data\.deb must have the SHA-256 .* and was removed"):
        read_package(package, report=lambda line: None)
    assert not part.exists()


@pytest.mark.parametrize("existing", ["proteins.fasta.gz", "proteins.json"])
def test_nothing_is_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(FileExistsError, match=f"{existing} exists and is not overwritten"):
        fetch_proteins(tmp_path / "proteins.fasta.gz", "fasta", from_paths=["mine.fasta"])
    assert (tmp_path / existing).read_text() == "precious"


def test_a_failure_leaves_nothing_behind(tmp_path):
    source = tmp_path / "mine.fasta"
    source.write_text(">a\nMKV\n>b\nM1V\n")
    with pytest.raises(ValueError, match="line 4: '1' in 'b'"):
        fetch_proteins(tmp_path / "proteins.fasta.gz", "fasta", from_paths=[source])
    assert list(tmp_path.iterdir()) == [source]


def test_a_damaged_database_is_refused(swissprot, tmp_path):
    annotation = swissprot / "usr/share/metastudent-data/dataset_201401/BPO/goasp_annot.dat"
    annotation.write_text("P1\tGO:0000001\n")
    with pytest.raises(ValueError, match="has 2 sequences and its annotation 1"):
        fetch_proteins(tmp_path / "proteins.fasta.gz", "swissprot", from_paths=[swissprot])


@pytest.mark.parametrize(
    ("output", "options", "error", "words"),
    [
        ("proteins.fa", {}, ValueError, r"must be named NAME\.fasta\.gz, got 'proteins\.fa'"),
        ("x/p.fasta.gz", {}, FileNotFoundError, "x does not exist. Create it first"),
        ("p.fasta.gz", {"source": "trembl"}, ValueError, "unknown source 'trembl'"),
        ("p.fasta.gz", {"clustering": "kmer"}, ValueError, "unknown clustering 'kmer'"),
        ("p.fasta.gz", {"source": "fasta"}, ValueError, "needs the files to read"),
        ("p.fasta.gz", {"from_paths": ["a", "b"]}, ValueError, "one package or folder, got 2"),
        ("p.fasta.gz", {"from_paths": ["a.deb"]}, FileNotFoundError, r"no such .*: a\.deb"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_options_are_named(tmp_path, output, options, error, words):
    with pytest.raises(error, match=words):
        fetch_proteins(tmp_path / output, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_apt_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"'apt-get', which is not on the PATH"):
        fetch_proteins(tmp_path / "proteins.fasta.gz", "swissprot")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_who_waits_for_the_same_download_has_a_folder_for_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    waits, others = threading.Event(), []

    class Text(Package[str]):
        def download(self, folder):
            if not others:
                others.append(threads.submit(read_package, self, report=lambda line: waits.set()))
                assert waits.wait(60)
            (folder / "text").write_text("content")
            return folder / "text"

        def unpack(self, path, folder):
            shutil.copytree(path.parent, folder)
            return "1.0"

    package = Text("p", "MIT", lambda folder: (folder / "text").read_text())
    with ThreadPoolExecutor() as threads:
        found = read_package(package, report=lambda line: None)
        assert found == others[0].result(60)
    assert found[0] == "content"
