"""Cut a part out of a set of proteins for machines that take small files only.

    performers data proteins swissprot.fasta.gz
    python tools/build_subset.py swissprot.fasta.gz swissprot-part.fasta.gz

Whole families, which contain whole clusters, are taken in the order of a hash until they have 48
million residues (of Swiss-Prot: 29 %, 20 MB). So the choice is nobody's, and nothing that is left
out is related to what is taken more closely than two families are. The output is the same, byte for
byte, for the same input.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from hashlib import blake2b
from pathlib import Path

from performers.data.fasta import FastaRecord
from performers.data.fetch import card_path, write_proteins
from performers.data.proteins import Protein, read_proteins

NUM_RESIDUES = 48_000_000


def choose(proteins: list[Protein], num_residues: int = NUM_RESIDUES) -> list[Protein]:
    """Families in the order of the hash of their least sequence, as long as they fit."""
    families = defaultdict(list)
    for protein in proteins:
        families[protein.family].append(protein)
    chosen: list[Protein] = []
    left = num_residues
    for family in sorted(families.values(), key=_hash):
        size = sum(len(protein.sequence) for protein in family)
        if size <= left:
            chosen += family
            left -= size
    return chosen


def _hash(family: list[Protein]) -> bytes:
    least = min(protein.sequence for protein in family)
    return blake2b(least.encode(), digest_size=16).digest()


def write_part(source: Path, output: Path, chosen: list[Protein]) -> dict[str, object]:
    """Write proteins with their groups, and a card that names their source; returns the card."""
    card = json.loads(card_path(source).read_text(encoding="utf-8"))
    origin = {**card["source"], "cut from": {"file": card["file"], "sha256": card["sha256"]}}
    return write_proteins(
        output,
        [FastaRecord(p.identifier, p.description, p.sequence) for p in chosen],
        [int(p.cluster) for p in chosen],
        [int(p.family) for p in chosen],
        provenance={"source": origin, "clustering": card["clustering"]},
    )


if __name__ == "__main__":
    source, output = map(Path, sys.argv[1:])
    print(write_part(source, output, choose(read_proteins(source)[0])))
