"""From proteins to what a model trains on: deduplicate, split by homology, crop or concatenate.

    FASTA ──read_proteins──► Protein(sequence, cluster, family)
          ──split_proteins──► train, valid, test, ood
          ──crop_sequences──► <bos> M K V … L <eos>        at most length tokens, or
          ──concatenate_sequences──► M K V … L <eos> M A … windows of length tokens

Source: Choromanski et al. 2021, Appendix C.1. The paper splits at random and says that homologues
may then be on both sides. Here no cluster is on both sides, unless `split_by` asks for the paper's
split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

from torch import Tensor

from performers.checks import check_choice, check_count
from performers.data.clusters import cluster_by_kmers
from performers.data.fasta import distinct_records, read_fasta
from performers.data.tokens import TokenDataset, concatenate_tokens, crop_tokens
from performers.data.vocabulary import VOCAB_SIZE, encode

__all__ = [
    "SAMPLE_PATH",
    "SPLITS",
    "Protein",
    "ProteinSplits",
    "concatenate_sequences",
    "crop_sequences",
    "find_protein",
    "load_proteins",
    "read_proteins",
    "split_proteins",
]

SAMPLE_PATH = Path(__file__).parent / "sample" / "proteins.fasta.gz"

Source = str | Path | Sequence[str | Path]

SPLITS = ("train", "valid", "test", "ood")

# `performers data proteins` writes these at the end of a description, in the style of UniProt's OS=
# and GN=.
_GROUPS = re.compile(r"(?:^|\s)Cluster=(\S+) Family=(\S+)$")


@dataclass(frozen=True)
class Protein:
    """A protein, and its groups, which a split keeps whole. A family contains whole clusters."""

    identifier: str
    description: str
    sequence: str
    cluster: str
    family: str


@dataclass(frozen=True, eq=False)
class ProteinSplits:
    """Training, validation and test sets, and `ood`: families with no member elsewhere."""

    train: TokenDataset
    valid: TokenDataset
    test: TokenDataset
    ood: TokenDataset
    num_proteins: int
    num_duplicates: int

    def summary(self) -> dict[str, int]:
        """Counts for a report: proteins, duplicates, sequences and tokens of each split."""
        counts = {"proteins": self.num_proteins, "duplicates": self.num_duplicates}
        for name in SPLITS:
            dataset: TokenDataset = getattr(self, name)
            counts |= {f"{name}_sequences": len(dataset), f"{name}_tokens": len(dataset.tokens)}
        return counts

    def description(self, source: str | Sequence[str]) -> str:
        """What the sets are made of, in words."""
        files = "the UniProt sample of the package" if source == "sample" else listed(source)
        counts = self.summary()
        return (
            f"{files}: {counts['proteins']:,} proteins, {counts['duplicates']:,} duplicates "
            f"dropped, {counts['train_sequences']:,} sequences with {counts['train_tokens']:,} "
            "tokens to train on"
        )


def load_proteins(
    source: Source = "sample",
    *,
    length: int = 1024,
    concatenate: bool = False,
    split_by: Literal["cluster", "sequence"] = "cluster",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    ood_fraction: float = 0.1,
    seed: int = 0,
) -> ProteinSplits:
    """Read, deduplicate, split and tokenize proteins.

    source: `"sample"` (the UniProt sample that ships with the package) or FASTA files, gzipped or
        not.
    length, concatenate: one protein a sequence, cropped to `length` tokens; or proteins end to end
        in windows of `length`. The paper's are 1024 cropped and 8192 concatenated.
    split_by, the fractions, seed: see `split_proteins`.

    Raises ValueError for a bad option, for a defect of a file (see `read_fasta`) and for too few
    proteins to fill each split; FileNotFoundError for a file that is not there.
    """
    check_count("length", length)
    _check_split(split_by, valid_fraction, test_fraction, ood_fraction)
    proteins, num_duplicates = read_proteins(source)
    split = split_proteins(
        proteins,
        split_by=split_by,
        valid_fraction=valid_fraction,
        test_fraction=test_fraction,
        ood_fraction=ood_fraction,
        seed=seed,
    )
    build = concatenate_sequences if concatenate else crop_sequences
    return ProteinSplits(
        **{name: build([protein.sequence for protein in split[name]], length) for name in SPLITS},
        num_proteins=len(proteins) + num_duplicates,
        num_duplicates=num_duplicates,
    )


def read_proteins(source: Source = "sample") -> tuple[list[Protein], int]:
    """The distinct proteins of a source in file order, and how many repetitions were dropped.

    Clusters and families come from `Cluster=… Family=…` at the end of the descriptions, where
    `performers data proteins` writes them. If any protein lacks them, or if there are several
    files, whose groups are unrelated, all are clustered anew by shared words (`cluster_by_kmers`),
    which finds close homologues only, and each cluster is its own family.
    """
    paths: Sequence[str | Path] = [source] if isinstance(source, str | Path) else source
    if source == "sample":
        paths = [SAMPLE_PATH]
    all_records = list(read_fasta(paths))
    records = distinct_records(all_records)
    groups = [_GROUPS.search(record.description) for record in records]
    if len(paths) == 1 and all(groups):
        labels = [(found[1], found[2]) for found in groups if found]
    else:
        clusters = cluster_by_kmers([record.sequence for record in records])
        labels = [(str(cluster), str(cluster)) for cluster in clusters]
    proteins = [
        Protein(record.identifier, _GROUPS.sub("", record.description), record.sequence, *label)
        for record, label in zip(records, labels, strict=True)
    ]
    return proteins, len(all_records) - len(proteins)


def find_protein(accession: str, source: Source = "sample") -> Protein:
    """The protein of an accession, as `P00974` in `sp|P00974|BPT1_BOVIN`, or of an identifier.

    Raises KeyError when the source has no such protein.
    """
    for protein in read_proteins(source)[0]:
        if accession == protein.identifier or accession in protein.identifier.split("|"):
            return protein
    raise KeyError(
        f"no protein {accession!r} in {source}. Give an accession that stands in its headers."
    )


def split_proteins(
    proteins: Sequence[Protein],
    *,
    split_by: Literal["cluster", "sequence"] = "cluster",
    valid_fraction: float = 0.1,
    test_fraction: float = 0.1,
    ood_fraction: float = 0.1,
    seed: int = 0,
) -> dict[str, list[Protein]]:
    """Divide proteins into `train`, `valid`, `test` and `ood`.

    First whole families go to `ood`, then whole clusters to `valid` and `test` (with
    `split_by="sequence"`, as in the paper, single proteins, and homologues leak), as long as they
    fit into the fraction; `train` is what remains. The order in which groups are tried is a hash of
    the seed and the group's own sequences, so the split does not depend on the order of the files.

    Raises ValueError when a split with a positive fraction, or `train`, would be empty.
    """
    _check_split(split_by, valid_fraction, test_fraction, ood_fraction)
    unit = _cluster if split_by == "cluster" else _sequence
    split = {}
    remaining = list(proteins)
    for name, fraction, unit_of in (
        ("ood", ood_fraction, _family),
        ("valid", valid_fraction, unit),
        ("test", test_fraction, unit),
    ):
        split[name], remaining = _take_whole_groups(
            remaining, unit_of, fraction * len(proteins), seed
        )
        if fraction and not split[name]:
            raise ValueError(
                f"the {name} split needs at least one group that fits into {fraction:g} of "
                f"{len(proteins)} proteins ({len(set(map(unit_of, proteins)))} groups). Give more "
                f"or more varied proteins, a larger {name}_fraction, or {name}_fraction=0 to go "
                "without."
            )
    if not remaining:
        raise ValueError(f"no protein of {len(proteins)} is left to train on. Give more proteins.")
    split["train"] = remaining
    # Neighbours within a split must not be homologues: concatenated, they would share a window.
    return {name: sorted(split[name], key=lambda p: _hash(p.sequence, seed)) for name in SPLITS}


def crop_sequences(sequences: Sequence[str], length: int) -> TokenDataset:
    """One protein a sequence, `<bos> letters <eos>`, of which the first `length` tokens stay.

    A protein that is cut has no <eos>: it does not end there.
    """
    return crop_tokens(_rows(sequences), length, VOCAB_SIZE)


def concatenate_sequences(sequences: Sequence[str], length: int) -> TokenDataset:
    """Whole proteins end to end, each followed by <eos>, in disjoint windows of `length` tokens.

    The tokens after the last whole window are left out, so that every sequence has the same length.

    Raises ValueError when the proteins do not fill one window.
    """
    return concatenate_tokens(_rows(sequences), length, VOCAB_SIZE)


def listed(source: str | Sequence[str]) -> str:
    """The names of files, in words."""
    return source if isinstance(source, str) else ", ".join(source)


def _rows(sequences: Sequence[str]) -> list[Tensor]:
    return [encode(sequence).byte() for sequence in sequences]


def _check_split(
    split_by: str, valid_fraction: float, test_fraction: float, ood_fraction: float
) -> None:
    check_choice("split_by", split_by, ("cluster", "sequence"))
    fractions = {"valid": valid_fraction, "test": test_fraction, "ood": ood_fraction}
    for name, fraction in fractions.items():
        if not 0 <= fraction < 1:
            raise ValueError(f"{name}_fraction must be at least 0 and below 1, got {fraction}.")
    if sum(fractions.values()) >= 1:
        raise ValueError(
            f"the fractions must leave something to train on: together {fractions} reach 1."
        )


def _take_whole_groups(
    proteins: Sequence[Protein], group_of: Callable[[Protein], str], quota: float, seed: int
) -> tuple[list[Protein], list[Protein]]:
    """Take groups in the order of their hash, as long as they fit. Returns what was taken and what
    was left.
    """
    groups = defaultdict(list)
    for protein in proteins:
        groups[group_of(protein)].append(protein)
    taken: list[Protein] = []
    left: list[Protein] = []
    for group in sorted(groups.values(), key=lambda group: _group_hash(group, seed)):
        # A group that does not fit is left, and smaller groups after it may still fit.
        (taken if len(taken) + len(group) <= quota else left).extend(group)
    return taken, left


def _group_hash(group: Sequence[Protein], seed: int) -> bytes:
    # The hash of one member. The least hash of all members would put large groups first.
    return _hash(min(protein.sequence for protein in group), seed)


def _family(protein: Protein) -> str:
    return protein.family


def _cluster(protein: Protein) -> str:
    return protein.cluster


def _sequence(protein: Protein) -> str:
    return protein.sequence


def _hash(sequence: str, seed: int) -> bytes:
    return blake2b(f"{seed} {sequence}".encode(), digest_size=16).digest()
