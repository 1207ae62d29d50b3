"""Build the sample of proteins that ships in src/performers/data/sample.

    performers data proteins examples.fasta.gz --source examples
    python tools/build_sample.py examples.fasta.gz metastudent-data_2.0.1-8_all.deb

Whole families of 3 to 60 proteins, so that the sample can be split by family and there is something
to learn in each; taken in the order of a hash, so that the choice is nobody's; and bovine
pancreatic trypsin inhibitor (P00974), whose attention the paper draws. Needs MMseqs2 on the PATH.
The output is the same, byte for byte, for the same input.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path

from performers.data.fasta import FastaRecord
from performers.data.fetch import SOURCES, card_path, group_homologues, read_package, write_proteins
from performers.data.proteins import SAMPLE_PATH, Protein, read_proteins

NUM_PROTEINS = 4800
FAMILY_SIZES = range(3, 61)
MAX_RESIDUES = 2048  # a few proteins beyond 1024 stay, for cropping to have something to do

# The package names its entries by accession alone; the rest is the entry's own header at UniProt.
BPTI_IDENTIFIER = "sp|P00974|BPT1_BOVIN"
BPTI_DESCRIPTION = "Pancreatic trypsin inhibitor OS=Bos taurus PE=1 SV=2"


def choose(proteins: list[Protein]) -> list[FastaRecord]:
    families = defaultdict(list)
    for protein in proteins:
        if len(protein.sequence) <= MAX_RESIDUES:
            families[protein.family].append(protein)
    eligible = [family for family in families.values() if len(family) in FAMILY_SIZES]
    eligible.sort(key=lambda family: _hash(min(protein.sequence for protein in family)))
    chosen: list[Protein] = []
    for family in eligible:
        if len(chosen) + len(family) < NUM_PROTEINS:
            chosen += family
    return [FastaRecord(p.identifier, p.description, p.sequence) for p in chosen]


def bovine_trypsin_inhibitor(package: Path) -> tuple[FastaRecord, dict[str, object]]:
    records, origin = read_package(SOURCES["swissprot"], package)
    sequence = next(record.sequence for record in records if record.identifier == "P00974")
    return FastaRecord(BPTI_IDENTIFIER, BPTI_DESCRIPTION, sequence), origin


def _hash(sequence: str) -> bytes:
    return blake2b(sequence.encode(), digest_size=16).digest()


if __name__ == "__main__":
    examples, swissprot = map(Path, sys.argv[1:])
    inhibitor, origin = bovine_trypsin_inhibitor(swissprot)
    records = [*choose(read_proteins(examples)[0]), inhibitor]
    clusters, families, method = group_homologues([r.sequence for r in records], "mmseqs")
    card = json.loads(card_path(examples).read_text(encoding="utf-8"))
    provenance: dict[str, object] = {"source": [card["source"], origin], "clustering": method}
    print(write_proteins(SAMPLE_PATH, records, clusters, families, provenance=provenance))
