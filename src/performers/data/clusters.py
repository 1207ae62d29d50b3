"""Groups of homologous proteins, which a split must not separate.

Both methods build a graph of similar pairs and take its connected components, so that no link that
was found joins two groups:

    mmseqs   alignments by MMseqs2 (Steinegger and Söding 2017): sees homologues down to about
             30 % identity; time grows with the square of the number of sequences
    kmers    words shared on one diagonal, in plain torch: sees the closer homologues; nothing to
             install; time grows with the number of residues
"""

from __future__ import annotations

import math
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = ["cluster_by_kmers", "cluster_by_mmseqs", "merge_groups"]

# Amino acids that BLOSUM62 scores as alike count as one, so that a word still matches where exact
# letters have diverged. Anomalous letters are in no group.
_GROUPS = ("AST", "C", "DN", "EQ", "FWY", "G", "H", "ILMV", "KR", "P")
_WORD_LENGTH = 8
# Words with fewer different letters are low-complexity repeats, which unrelated proteins share.
_MIN_DISTINCT_GROUPS = 4
# A short protein inside a long one is a domain, and shared domains would join unrelated families.
_MIN_LENGTH_RATIO = 0.8
_INDEX_BITS = 36  # 10¹⁰ residues; a word needs 27 more
_RESIDUES_A_PASS = 1 << 24  # about a gigabyte of working memory


def cluster_by_kmers(sequences: Sequence[str]) -> list[int]:
    """Group numbers of proteins linked by shared words: eight letters of a ten-letter alphabet.

    Each word links every protein that has it to the longest one that has it. A link counts when
    `needed` words agree on one diagonal (the same shift between the two proteins) and the lengths
    differ by less than a fifth:

        needed = log₇(residues) + 3.5 − 7      rounded up, at least 4

    so that chance makes few links at any size: letters of the reduced alphabet agree by chance once
    in about 7.

    Numbers count from 0 in order of first appearance. Cost: O(residues) words, sorted in passes of
    bounded memory.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    by_length = lengths.argsort(descending=True, stable=True)
    text = bytearray("".join(sequences[i] for i in by_length.tolist()), "ascii")
    if not text:
        return list(range(len(sequences)))
    lengths = lengths[by_length]
    starts = lengths.cumsum(0) - lengths
    diagonals = 2 * int(lengths[0])  # how many there can be
    needed = max(4, math.ceil(math.log(len(text), 7) + 3.5) - _WORD_LENGTH + 1)

    words, is_word = _words(text, starts)
    # Residues lie in one line, longest protein first: one index tells protein and position, and the
    # smallest index of a word is its occurrence in the longest protein.
    passes = max(1, len(text) // _RESIDUES_A_PASS)
    links = []
    # Equal words have equal remainders, so each pass sees all occurrences of its words.
    for remainder in range(passes):
        index = (is_word & (words.remainder(passes) == remainder)).nonzero().squeeze(1)
        # Word in the upper bits, index in the lower: one sort groups equal words, each group by
        # index.
        ordered = (words[index].long() << _INDEX_BITS | index).sort().values
        word, index = ordered >> _INDEX_BITS, ordered & ((1 << _INDEX_BITS) - 1)
        _, occurrences = word.unique_consecutive(return_counts=True)
        # The first index of each group of equal words, repeated for every word of the group.
        first = index[occurrences.cumsum(0) - occurrences].repeat_interleave(occurrences)
        longest, other = _protein_at(first, starts), _protein_at(index, starts)
        is_link = (longest != other) & (lengths[other] >= _MIN_LENGTH_RATIO * lengths[longest])
        longest, other, first, index = (x[is_link] for x in (longest, other, first, index))
        diagonal = (index - starts[other]) - (first - starts[longest])
        # (longest, other, diagonal) as one number, so that `unique` counts the words that agree on
        # it. A diagonal can be negative, hence the offset.
        links.append((longest * len(sequences) + other) * diagonals + diagonal + diagonals // 2)
    link, agreeing = torch.cat(links).unique(return_counts=True)
    pair = link[agreeing >= needed] // diagonals
    edges = torch.stack([pair // len(sequences), pair % len(sequences)])
    components = _components(edges, len(sequences))
    return _renumbered(components[by_length.argsort()].tolist())


def cluster_by_mmseqs(
    sequences: Sequence[str], min_identity: float = 0.3, min_coverage: float = 0.8
) -> list[int]:
    """Group numbers of proteins linked by an alignment that MMseqs2 finds.

    A link is an alignment with E ≤ 10⁻³, at least `min_identity` and covering `min_coverage` of
    both proteins. Numbers count from 0 in order of first appearance. It takes minutes for 20,000
    proteins on 2 cores, and grows with the square of their number.

    Raises FileNotFoundError when `mmseqs` is not on the PATH and RuntimeError, with its message,
    when it fails.
    """
    program = shutil.which("mmseqs")
    if program is None:
        raise FileNotFoundError(
            "clustering by alignment needs MMseqs2 and finds no `mmseqs` on the PATH. Install it "
            '(Debian: apt-get install mmseqs2) or choose clustering="kmers".'
        )
    with tempfile.TemporaryDirectory() as folder:
        fasta, result = Path(folder, "proteins.fasta"), Path(folder, "result")
        fasta.write_text("".join(f">{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
        options = f"--min-seq-id {min_identity} -c {min_coverage} -s 6 -e 0.001 -v 1"
        # With these options the groups are the connected components of all links that were found.
        options += " --single-step-clustering 1 --cluster-mode 1"
        command = [program, "easy-cluster", str(fasta), str(result), str(Path(folder, "work"))]
        command += options.split()
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(
                f"{' '.join(command[:2])} failed with status {finished.returncode}: "
                f"{(finished.stderr or finished.stdout).strip()[-500:]}"
            )
        lines = Path(folder, "result_cluster.tsv").read_text().splitlines()
    representative = {
        int(member): int(first) for first, member in (line.split("\t") for line in lines)
    }
    return _renumbered([representative[i] for i in range(len(sequences))])


def merge_groups(fine: Sequence[int], coarse: Sequence[int]) -> list[int]:
    """The finest grouping that separates neither a group of `fine` nor one of `coarse`.

    Clusters and families from two separate searches need not be nested; the families that this
    returns contain whole clusters.
    """
    offset = max(fine, default=-1) + 1
    edges = torch.tensor([list(fine), [offset + group for group in coarse]], dtype=torch.int64)
    components = _components(edges, offset + max(coarse, default=-1) + 1)
    return _renumbered([int(components[group]) for group in fine])


def _words(text: bytearray, starts: Int64[Tensor, " proteins"]) -> tuple[Tensor, Tensor]:
    """The word that starts at each residue, as a number, and whether it may link proteins."""
    group_of_byte = torch.full((256,), len(_GROUPS), dtype=torch.uint8)
    for number, letters in enumerate(_GROUPS):
        for letter in letters:
            group_of_byte[ord(letter)] = number
    groups = group_of_byte[torch.frombuffer(text, dtype=torch.uint8).int()]
    count = len(text)
    words = torch.zeros(count, dtype=torch.int32)
    seen = torch.zeros(count, dtype=torch.int16)  # one bit a group
    is_word = torch.ones(count, dtype=torch.bool)
    for shift in range(_WORD_LENGTH):
        group = torch.full((count,), len(_GROUPS), dtype=torch.uint8)
        group[: max(0, count - shift)] = groups[shift:]
        is_word &= group < len(_GROUPS)
        words = words * len(_GROUPS) + group
        seen |= 1 << group.to(torch.int16)
    distinct = torch.zeros(count, dtype=torch.uint8)
    for number in range(len(_GROUPS)):
        distinct += ((seen >> number) & 1).to(torch.uint8)
    is_word &= distinct >= _MIN_DISTINCT_GROUPS
    # No word crosses from one protein into the next.
    for back in range(1, _WORD_LENGTH):
        is_word[starts[starts >= back] - back] = False
    return words, is_word


def _protein_at(index: Int64[Tensor, " residues"], starts: Int64[Tensor, " proteins"]) -> Tensor:
    return torch.searchsorted(starts, index, right=True) - 1


def _components(edges: Int64[Tensor, "2 edges"], count: int) -> Int64[Tensor, " count"]:
    """The smallest member of each node's connected component, by hooking and pointer jumping."""
    labels = torch.arange(count)
    while True:
        least = torch.minimum(labels[edges[0]], labels[edges[1]])
        hooked = labels.clone()
        for end in edges:
            # Hooking: the root at each end of an edge takes the smaller label of both ends.
            hooked.scatter_reduce_(0, labels[end], least, "amin")
        # Pointer jumping: every label is replaced by the label of its label, so chains halve.
        hooked = hooked[hooked]
        if torch.equal(hooked, labels):
            return labels
        labels = hooked


def _renumbered(groups: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]
