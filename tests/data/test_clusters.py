import random
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from performers.data.clusters import cluster_by_kmers, cluster_by_mmseqs, merge_groups
from performers.data.vocabulary import STANDARD_AMINO_ACIDS


def random_protein(generator: random.Random, length: int) -> str:
    return "".join(generator.choices(STANDARD_AMINO_ACIDS, k=length))


def mutated(sequence: str, identity: float, generator: random.Random) -> str:
    return "".join(
        letter if generator.random() < identity else generator.choice(STANDARD_AMINO_ACIDS)
        for letter in sequence
    )


def families(num_families: int, size: int, identity: float) -> tuple[list[str], list[int]]:
    """Random proteins, each with mutated copies, and the number of the family of each."""
    generator = random.Random(0)
    sequences, labels = [], []
    for family in range(num_families):
        ancestor = random_protein(generator, generator.randint(150, 400))
        sequences += [ancestor, *(mutated(ancestor, identity, generator) for _ in range(size - 1))]
        labels += [family] * size
    return sequences, labels


needs_mmseqs = pytest.mark.skipif(shutil.which("mmseqs") is None, reason="MMseqs2 is not installed")
METHODS = [cluster_by_kmers, pytest.param(cluster_by_mmseqs, marks=needs_mmseqs)]


@pytest.mark.parametrize("cluster", METHODS)
def test_families_of_close_homologues_are_found_exactly(cluster):
    sequences, labels = families(num_families=29, size=7, identity=0.8)
    assert cluster(sequences) == labels


def test_word_clusters_do_not_depend_on_the_order():
    sequences, labels = families(num_families=13, size=5, identity=0.8)
    order = list(range(len(sequences)))
    random.Random(1).shuffle(order)
    shuffled = cluster_by_kmers([sequences[i] for i in order])
    pairs = list(zip(shuffled, (labels[i] for i in order), strict=True))
    assert len(set(pairs)) == len(set(shuffled)) == 13


def test_a_common_repeat_does_not_join_unrelated_proteins():
    generator = random.Random(2)
    repeat = "SSQQPP" * 11
    sequences = [
        random_protein(generator, 199) + repeat + random_protein(generator, 199) for _ in range(2)
    ]
    assert cluster_by_kmers(sequences) == [0, 1]


def test_no_word_reaches_from_one_protein_into_the_next():
    # Side by side, by length, the ends and beginnings make the same 14 letters twice.
    generator = random.Random(4)
    end, beginning = "ACDEFGH", "IKLMNPR"
    sequences = [
        random_protein(generator, 204) + end,
        beginning + random_protein(generator, 203),
        random_protein(generator, 202) + end,
        beginning + random_protein(generator, 201),
    ]
    assert cluster_by_kmers(sequences) == [0, 1, 2, 3]


def test_a_domain_does_not_join_proteins_of_unequal_length():
    generator = random.Random(3)
    domain = random_protein(generator, 101)
    assert cluster_by_kmers([domain, domain + random_protein(generator, 101)]) == [0, 1]


@pytest.mark.parametrize("sequences", [[], [""], ["M"], ["MKVLLWY", "", "MKVLLWY"], ["X" * 40] * 2])
def test_what_has_no_words_stands_alone(sequences):
    assert cluster_by_kmers(sequences) == list(range(len(sequences)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=23))
def test_merged_groups_are_the_finest_that_contain_both(pairs):
    fine = [first for first, _ in pairs]
    coarse = [second for _, second in pairs]
    merged = merge_groups(fine, coarse)
    for groups in (fine, coarse):
        assert len(set(zip(groups, merged, strict=True))) == len(set(groups))
    # Finest: whoever shares a merged group is reached by steps within a fine or a coarse group.
    for label in set(merged):
        members = {i for i, group in enumerate(merged) if group == label}
        reached = {min(members)}
        while grown := {
            i
            for i in members - reached
            if any(fine[i] == fine[j] or coarse[i] == coarse[j] for j in reached)
        }:
            reached |= grown
        assert reached == members


def test_a_missing_mmseqs_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match='or choose clustering="kmers"'):
        cluster_by_mmseqs(["MKV"])


def test_a_failing_mmseqs_is_quoted(tmp_path, monkeypatch):
    program = tmp_path / "mmseqs"
    program.write_text("#!/bin/sh\necho 'no memory left' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(RuntimeError, match="failed with status 3: no memory left"):
        cluster_by_mmseqs(["MKV"])
