"""Larger sets of real proteins, with a card that says where they came from.

Two Debian packages carry UniProt sequences, so that a data set has a name, a version and a checksum
without an account or a web page:

    swissprot   metastudent-data: 516,371 Swiss-Prot entries of January 2014, 435,059 of them
    distinct examples    mmseqs2-examples: 20,000 UniProt entries, mostly TrEMBL, 18,801 of them
    distinct

Any FASTA files (UniProt's own downloads, for one) go the same way with source="fasta".
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from filelock import FileLock

from performers.checks import check_choice
from performers.data.clusters import cluster_by_kmers, cluster_by_mmseqs, merge_groups
from performers.data.fasta import FastaRecord, distinct_records, read_fasta
from performers.records.files import writing

__all__ = [
    "SOURCES",
    "Clustering",
    "card_path",
    "fetch_proteins",
    "group_homologues",
    "read_package",
    "write_proteins",
]

Clustering = Literal["mmseqs", "kmers"]

# Above this many proteins an all-against-all search takes hours on a small machine.
_MMSEQS_LIMIT = 50_000

_UNIPROT_CREDIT = (
    "Sequences: The UniProt Consortium, https://www.uniprot.org, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/)."
)


# What apt-get --print-uris says of a package: 'http://…' NAME.deb BYTES SHA256:…
_URI = re.compile(r"^'[^']+' (?P<file>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$", re.M)

Content = TypeVar("Content")


@dataclass(frozen=True)
class Package(ABC, Generic[Content]):
    """A package that holds data, and how to read them once it is unpacked."""

    name: str
    license: str
    read: Callable[[Path], Content]

    @abstractmethod
    def download(self, folder: Path) -> Path:
        """Leave its file in this folder, which may hold a part of it."""

    @abstractmethod
    def unpack(self, path: Path, folder: Path) -> str:
        """Unpack its file into a new folder; returns its version."""


class DebianPackage(Package[Content]):
    """One of Debian, by its name there."""

    def download(self, folder: Path) -> Path:
        """Shows how much is there, goes on with a part that lies in the folder, and compares the
        whole with the checksum in Debian's signed index.
        """
        printed = _run("apt-get", "download", "--print-uris", self.name)
        found = _URI.search(printed)
        if found is None:
            raise RuntimeError(
                f"apt-get must say where {self.name} is, got {printed.strip()!r}. Renew its lists "
                "with apt-get update."
            )
        path, size, checksum = folder / found["file"], int(found["size"]), found["sha256"]
        if not path.exists() or path.stat().st_size < size:
            with _progress(path, size):
                _run("apt-get", "download", self.name, cwd=str(folder))
        if (got := _sha256(path)) != checksum:
            path.unlink()
            raise RuntimeError(
                f"{path.name} must have the SHA-256 {checksum}, got {got}, and was removed. "
                "Download it again."
            )
        return path

    def unpack(self, path: Path, folder: Path) -> str:
        version = _run("dpkg-deb", "--field", str(path), "Version").strip()
        _run("dpkg-deb", "--extract", str(path), str(folder))
        return version


class NpmPackage(Package[Content]):
    """One of npm; the name may end in @ and a version."""

    def download(self, folder: Path) -> Path:
        _run("npm", "pack", "--silent", self.name, cwd=str(folder))
        return next(folder.glob("*.tgz"))

    def unpack(self, path: Path, folder: Path) -> str:
        folder.mkdir()
        _run("tar", "--extract", "--file", str(path), "--directory", str(folder))
        described = json.loads((folder / "package" / "package.json").read_text(encoding="utf-8"))
        return str(described["version"])


def fetch_proteins(
    output: str | Path,
    source: str = "swissprot",
    *,
    from_paths: Sequence[str | Path] = (),
    clustering: Clustering | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, object]:
    """Write distinct proteins with their clusters and families to `output`, and a card beside it.

    output: a new file, `NAME.fasta.gz`; the card is `NAME.json` in the same folder.
    source: `"swissprot"` or `"examples"`, downloaded with `apt-get download` (225 MB, 10 MB), or
        `"fasta"`.
    from_paths: instead of the download, the `.deb` file or the folder it was unpacked to; for
        `"fasta"`, the files.
    clustering: `"mmseqs"`, `"kmers"`, or None for MMseqs2 if installed, up to 50,000 proteins.
    report: called with a line of text before each step that takes time.

    Returns the card. Raises FileExistsError rather than overwrite, FileNotFoundError for a missing
    file or program, ValueError for a bad option or file, RuntimeError with the message of a program
    that failed. Nothing is written until everything is computed.
    """
    output = Path(output)
    check_choice("source", source, (*SOURCES, "fasta"))
    if clustering is not None:
        check_choice("clustering", clustering, ("mmseqs", "kmers"))
    for path in (output, card_path(output)):
        if path.exists():
            raise FileExistsError(
                f"{path} exists and is not overwritten. Remove it or choose another name."
            )
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} does not exist. Create it first.")

    if source == "fasta":
        if not from_paths:
            raise ValueError('source="fasta" needs the files to read: give them as from_paths.')
        records = list(read_fasta(from_paths))
        origin: dict[str, object] = {
            "files": {Path(path).name: _sha256(Path(path)) for path in from_paths},
            "license": "that of the files given",
        }
    else:
        if len(from_paths) > 1:
            raise ValueError(
                f"source={source!r} takes one package or folder, got {len(from_paths)} paths."
            )
        records, origin = read_package(SOURCES[source], *map(Path, from_paths), report=report)

    distinct = distinct_records(records)
    report(f"{len(records):,} proteins, {len(distinct):,} distinct; grouping homologues")
    sequences = [record.sequence for record in distinct]
    clusters, families, method = group_homologues(sequences, clustering)
    report(f"writing {output}")
    return write_proteins(
        output,
        distinct,
        clusters,
        families,
        provenance={"source": origin, "clustering": method},
        num_duplicates=len(records) - len(distinct),
    )


def read_package(
    package: Package[Content],
    path: Path | None = None,
    *,
    report: Callable[[str], None] = print,
) -> tuple[Content, dict[str, object]]:
    """What a package holds (from `path`, if not downloaded), and its origin."""
    origin: dict[str, object] = {"package": package.name, "license": package.license}
    if path is not None and path.is_dir():
        return package.read(path), origin
    with tempfile.TemporaryDirectory() as folder:
        unpacked = Path(folder, "unpacked")
        if path is not None:
            if not path.exists():
                raise FileNotFoundError(
                    f"no such package or folder: {path}. Give the file of {package.name}, or a "
                    "folder."
                )
            origin |= _unpack(package, path, unpacked, report)
        else:
            report(f"downloading the package {package.name}")
            partial = _downloads() / package.name.replace("/", "-")
            partial.parent.mkdir(parents=True, exist_ok=True)
            # Another process may download the same package, and remove its folder when it has.
            with FileLock(f"{partial}.lock"):
                partial.mkdir(exist_ok=True)
                origin |= _unpack(package, package.download(partial), unpacked, report)
                shutil.rmtree(partial)
        return package.read(unpacked), origin


def _unpack(
    package: Package[Content], path: Path, unpacked: Path, report: Callable[[str], None]
) -> dict[str, object]:
    """Unpack the file of a package; what goes into the origin of its data."""
    report(f"unpacking {path.name}")
    return {
        "version": package.unpack(path, unpacked),
        "package_file": path.name,
        "package_sha256": _sha256(path),
    }


def _downloads() -> Path:
    """Where parts of files stay when a download is interrupted."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "performers", "downloads")


@contextmanager
def _progress(path: Path, size: int) -> Iterator[None]:
    """A bar that follows the size of a file, in a terminal."""
    from tqdm.auto import tqdm

    ended = threading.Event()

    def follow(bar: Any) -> None:
        while not ended.wait(0.2):
            bar.update((path.stat().st_size if path.exists() else 0) - bar.n)

    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield
            bar.update(size - bar.n)
        finally:
            ended.set()
            follower.join()


def group_homologues(
    sequences: Sequence[str], clustering: Clustering | None = None
) -> tuple[list[int], list[int], dict[str, object]]:
    """Cluster and family of each protein, and how they were found.

    With MMseqs2 a cluster is linked by alignments of 30 % identity over 80 % of both proteins, and
    a family by any significant alignment over half of both. By shared words there is one level: a
    family is a cluster.
    """
    if clustering is None:
        affordable = shutil.which("mmseqs") is not None and len(sequences) <= _MMSEQS_LIMIT
        clustering = "mmseqs" if affordable else "kmers"
    if clustering == "kmers":
        clusters = cluster_by_kmers(sequences)
        return clusters, clusters, {"method": "performers.data.clusters.cluster_by_kmers"}
    clusters = cluster_by_mmseqs(sequences, min_identity=0.3, min_coverage=0.8)
    related = cluster_by_mmseqs(sequences, min_identity=0.0, min_coverage=0.5)
    method: dict[str, object] = {
        "method": "MMseqs2 easy-cluster, sensitivity 6, connected components",
        "version": _run("mmseqs", "version").strip(),
        "cluster": "E ≤ 0.001, at least 30 % identity over 80 % of both",
        "family": "E ≤ 0.001 over 50 % of both",
    }
    return clusters, merge_groups(clusters, related), method


def write_proteins(
    output: Path,
    records: Sequence[FastaRecord],
    clusters: Sequence[int],
    families: Sequence[int],
    *,
    provenance: dict[str, object],
    num_duplicates: int = 0,
) -> dict[str, object]:
    """Write FASTA.gz with `Cluster=… Family=…` after each description, and its card.

    Returns the card. The same proteins give the same bytes. No file is ever left incomplete.
    """
    fasta = io.BytesIO()
    # Its header has no time and no file name, so that equal contents give equal files.
    with gzip.GzipFile("", "wb", 9, fasta, mtime=0) as compressed:
        for record, cluster, family in zip(records, clusters, families, strict=True):
            header = f"{record.identifier} {record.description}".strip()
            text = f">{header} Cluster={cluster} Family={family}\n{record.sequence}\n"
            compressed.write(text.encode())
    card: dict[str, object] = {
        "file": output.name,
        "sha256": hashlib.sha256(fasta.getbuffer()).hexdigest(),
        **provenance,
        "counts": {
            "records": len(records) + num_duplicates,
            "duplicates": num_duplicates,
            "proteins": len(records),
            "residues": sum(len(record.sequence) for record in records),
            "longest": max(len(record.sequence) for record in records),
            "clusters": len(set(clusters)),
            "families": len(set(families)),
        },
    }
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    _write_whole(card_path(output), text.encode())
    _write_whole(output, fasta.getbuffer())
    return card


def _write_whole(path: Path, content: bytes | memoryview) -> None:
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.write_bytes(content)
        part.replace(path)


def _read_swissprot(folder: Path) -> list[FastaRecord]:
    """The three BLAST databases of metastudent-data, each accession once.

    A `.psq` file holds the sequences one after another, a byte a residue in NCBIstdaa, with a zero
    byte before, between and after them; `goasp_annot.dat` names them line by line in the same
    order.
    """
    letter_of_byte = b"-ABCDEFGHIKLMNPQRSTVWXYZU*OJ".ljust(256, b"?")
    records: dict[str, FastaRecord] = {}
    for ontology in ("BPO", "MFO", "CCO"):
        database = folder / "usr/share/metastudent-data/dataset_201401" / ontology
        packed = (database / "goasp.fasta.psq").read_bytes()
        sequences = packed.translate(letter_of_byte).decode("ascii").strip("-").split("-")
        annotations = (database / "goasp_annot.dat").read_text(encoding="ascii").splitlines()
        if len(sequences) != len(annotations):
            raise ValueError(
                f"{database}: the database has {len(sequences)} sequences and its annotation "
                f"{len(annotations)}; they must be equal. Unpack the package again."
            )
        for sequence, annotation in zip(sequences, annotations, strict=True):
            accession = annotation.split("\t", 1)[0]
            records.setdefault(accession, FastaRecord(accession, "", sequence))
    return list(records.values())


def _read_examples(folder: Path) -> list[FastaRecord]:
    path = folder / "usr/share/doc/mmseqs2/example-data/DB.fasta.gz"
    # MMseqs2 has added "Split=0" to UniProt's descriptions.
    return [
        record._replace(description=record.description.removesuffix("Split=0").rstrip())
        for record in read_fasta(path)
    ]


SOURCES = {
    "swissprot": DebianPackage(
        "metastudent-data", f"GPL-2+ (package). {_UNIPROT_CREDIT}", _read_swissprot
    ),
    "examples": DebianPackage(
        "mmseqs2-examples", f"GPL-3+ (package). {_UNIPROT_CREDIT}", _read_examples
    ),
}


def card_path(output: Path) -> Path:
    """The path of the card of a data set: beside it, with the same name."""
    if not output.name.endswith(".fasta.gz"):
        raise ValueError(f"the output must be named NAME.fasta.gz, got {output.name!r}.")
    return output.with_name(output.name.removesuffix(".fasta.gz") + ".json")


def _run(program: str, *arguments: str, cwd: str | None = None) -> str:
    if shutil.which(program) is None:
        raise FileNotFoundError(
            f"this needs the program {program!r}, which is not on the PATH. Run it on Debian or "
            "Ubuntu, or give an unpacked package folder or FASTA files with --from."
        )
    finished = subprocess.run(
        [program, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise RuntimeError(
            f"{program} {' '.join(arguments)} failed with status {finished.returncode}: "
            f"{finished.stderr.strip()[-500:]}"
        )
    return finished.stdout


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
