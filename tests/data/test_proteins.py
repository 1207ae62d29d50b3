import hashlib
import json
import random
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from performers.data import (
    AMINO_ACIDS,
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    Protein,
    concatenate_sequences,
    crop_sequences,
    decode,
    find_protein,
    load_proteins,
    read_proteins,
    split_proteins,
)
from performers.data.proteins import SAMPLE_PATH, SPLITS

sequence_lists = st.lists(st.text(AMINO_ACIDS, min_size=1, max_size=41), min_size=1, max_size=11)


@st.composite
def grouped_proteins(draw):
    """Distinct proteins in nested groups of any sizes."""
    sequences = draw(
        st.lists(
            st.text(AMINO_ACIDS, min_size=1, max_size=7), unique=True, min_size=23, max_size=61
        )
    )
    clusters = [draw(st.integers(0, 19)) for _ in sequences]
    return [
        Protein(f"p{i}", "", sequence, cluster=str(cluster), family=str(cluster % 11))
        for i, (sequence, cluster) in enumerate(zip(sequences, clusters, strict=True))
    ]


@given(sequence_lists, st.integers(1, 53))
def test_cropping_keeps_the_first_tokens_of_each_protein(sequences, length):
    dataset = crop_sequences(sequences, length)
    assert len(dataset) == len(sequences)
    for item, sequence in zip(dataset, sequences, strict=True):
        whole = [BOS_TOKEN_ID, *crop_sequences([sequence], 1024)[0]["input_ids"][1:-1].tolist()]
        assert item["input_ids"].tolist() == [*whole, EOS_TOKEN_ID][:length]
        assert decode(item["input_ids"], skip_special_tokens=True) == sequence[: length - 1]


@given(sequence_lists, st.integers(1, 53))
def test_concatenation_loses_nothing_but_the_last_incomplete_window(sequences, length):
    chain = "".join(sequence + "<eos>" for sequence in sequences)
    num_tokens = sum(len(sequence) + 1 for sequence in sequences)
    if num_tokens < length:
        with pytest.raises(ValueError, match=f"must fill one window of length {length}"):
            concatenate_sequences(sequences, length)
        return
    dataset = concatenate_sequences(sequences, length)
    assert len(dataset) == num_tokens // length
    assert set(dataset.lengths) == {length}
    text = "".join(decode(item["input_ids"]) for item in dataset)
    assert chain.startswith(text)
    assert len(chain) - len(text) < length * len("<eos>")


def test_windows_of_one_token_lose_nothing():
    sequences = ["MKV", "WY"]
    dataset = concatenate_sequences(sequences, 1)
    assert "".join(decode(item["input_ids"]) for item in dataset) == "MKV<eos>WY<eos>"


def test_items_are_int64_and_indices_outside_are_refused():
    dataset = crop_sequences(["MKV", "W"], 1024)
    assert dataset[-1]["input_ids"].tolist() == dataset[1]["input_ids"].tolist()
    assert dataset[0]["input_ids"].dtype == torch.int64
    assert dataset.lengths == [5, 3]
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"has 2 sequences, got index {index}"):
            dataset[index]


@given(grouped_proteins(), st.sampled_from(["cluster", "sequence"]), st.integers(0, 99))
def test_no_family_is_in_ood_and_elsewhere_and_no_cluster_in_two_splits(proteins, split_by, seed):
    fractions = {"valid_fraction": 0.2, "test_fraction": 0.2, "ood_fraction": 0.2}
    try:
        split = split_proteins(proteins, split_by=split_by, **fractions, seed=seed)
    except ValueError:  # one of the splits would be empty
        reject()
    # Every protein once.
    assert Counter(p for name in SPLITS for p in split[name]) == Counter(proteins)
    families = {name: {p.family for p in split[name]} for name in SPLITS}
    clusters = {name: {p.cluster for p in split[name]} for name in SPLITS}
    for name in ("train", "valid", "test"):
        assert not families["ood"] & families[name]
        if split_by == "cluster":
            assert all(not clusters[name] & clusters[other] for other in SPLITS if other != name)
    for name in ("valid", "test", "ood"):
        assert 0 < len(split[name]) <= 0.2 * len(proteins)


@pytest.fixture(scope="module")
def sample():
    return read_proteins("sample")[0]


def test_the_split_depends_on_the_seed_and_not_on_the_order(sample):
    shuffled = random.Random(0).sample(sample, len(sample))
    assert split_proteins(shuffled, seed=3) == split_proteins(sample, seed=3)
    assert split_proteins(sample, seed=4)["valid"] != split_proteins(sample, seed=3)["valid"]


def test_splitting_does_not_prefer_large_clusters(sample):
    split = split_proteins(sample, seed=5)
    size = {name: len(split[name]) / len({p.cluster for p in split[name]}) for name in SPLITS}
    assert 0.5 < size["valid"] / size["train"] < 2


@pytest.mark.parametrize("split_by", ["cluster", "sequence"])
def test_splits_of_the_sample_have_the_fractions_asked_for(sample, split_by):
    split = split_proteins(
        sample, split_by=split_by, valid_fraction=0.05, test_fraction=0.15, ood_fraction=0.2
    )
    for name, fraction in {"valid": 0.05, "test": 0.15, "ood": 0.2, "train": 0.6}.items():
        assert len(split[name]) / len(sample) == pytest.approx(fraction, abs=0.002)


def test_a_fraction_of_0_leaves_the_split_empty(sample):
    split = split_proteins(sample, valid_fraction=0.2, test_fraction=0.0, ood_fraction=0.0)
    assert split["test"] == split["ood"] == []
    assert len(crop_sequences([], 17)) == len(concatenate_sequences([], 17)) == 0


def test_neighbours_in_a_split_are_not_homologues(sample):
    train = split_proteins(sample)["train"]
    adjacent = sum(a.family == b.family for a, b in pairwise(train))
    assert adjacent < 0.03 * len(train)


def test_too_few_groups_are_an_error():
    proteins = [Protein(f"p{i}", "", "M" * (i + 1), "0", "0") for i in range(97)]
    with pytest.raises(ValueError, match=r"ood split needs .* 0\.1 of 97 proteins \(1 groups\)"):
        split_proteins(proteins)
    with pytest.raises(ValueError, match="or valid_fraction=0 to go without"):
        split_proteins(proteins, ood_fraction=0.0)
    split = split_proteins(proteins, ood_fraction=0.0, split_by="sequence")
    assert [len(split[name]) for name in SPLITS] == [79, 9, 9, 0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"valid_fraction": 1.0}, r"valid_fraction must be at least 0 and below 1, got 1\.0"),
        ({"ood_fraction": -0.1}, r"ood_fraction must be at least 0 and below 1, got -0\.1"),
        ({"valid_fraction": 0.5, "test_fraction": 0.5}, "leave something to train on"),
        ({"split_by": "clusters"}, "unknown split_by 'clusters'.*Did you mean 'cluster'"),
        ({"length": 0}, "length must be a whole number of at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_bad_options_are_named_before_the_files_are_read(options, words):
    with pytest.raises(ValueError, match=words):
        load_proteins("nowhere.fasta", **options)


def test_identical_sequences_are_kept_once(tmp_path):
    path = tmp_path / "proteins.fasta"
    path.write_text(">a\nMKV\n>b\nWYW\n>c\nmkv\n")
    proteins, num_duplicates = read_proteins(path)
    assert [protein.identifier for protein in proteins] == ["a", "b"]
    assert num_duplicates == 1


def test_groups_written_in_one_file_are_kept_and_those_of_several_are_made_afresh(tmp_path):
    first, second = tmp_path / "first.fasta", tmp_path / "second.fasta"
    first.write_text(">a One OS=X Cluster=7 Family=2\nMKV\n>b Cluster=8 Family=2\nWYW\n")
    second.write_text(">c Cluster=7 Family=2\nACD\n")
    proteins, _ = read_proteins(first)
    assert [(p.description, p.cluster, p.family) for p in proteins] == [
        ("One OS=X", "7", "2"),
        ("", "8", "2"),
    ]
    assert [p.cluster for p in read_proteins([first, second])[0]] == ["0", "1", "2"]


def test_files_without_groups_are_clustered_by_their_words(tmp_path):
    generator = random.Random(0)
    families = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=131)) for _ in range(3)]
    path = tmp_path / "proteins.fasta"
    path.write_text(
        "".join(f">p{i}{end}\n{s}{end}\n" for i, s in enumerate(families) for end in ("", "K", "W"))
    )
    clusters = [protein.cluster for protein in read_proteins(path)[0]]
    assert clusters == [str(i) for i in range(3) for _ in range(3)]


def test_the_sample_is_what_its_card_says(sample):
    card = json.loads(SAMPLE_PATH.with_name("proteins.json").read_text(encoding="utf-8"))
    assert card["sha256"] == hashlib.sha256(SAMPLE_PATH.read_bytes()).hexdigest()
    assert card["counts"] == {
        "records": len(sample),
        "duplicates": 0,
        "proteins": len(sample),
        "residues": sum(len(protein.sequence) for protein in sample),
        "longest": max(len(protein.sequence) for protein in sample),
        "clusters": len({protein.cluster for protein in sample}),
        "families": len({protein.family for protein in sample}),
    }
    assert SAMPLE_PATH.stat().st_size < 2_000_000


def test_a_family_of_the_sample_contains_whole_clusters(sample):
    nested = {(protein.cluster, protein.family) for protein in sample}
    assert len(nested) == len({cluster for cluster, _ in nested})


def test_bovine_trypsin_inhibitor_is_in_the_sample():
    protein = find_protein("P00974")
    assert protein == find_protein("sp|P00974|BPT1_BOVIN")
    assert len(protein.sequence) == 100
    assert protein.sequence.startswith(
        "MKMSRLCLSVALLVLLGTLAASTPGCDTSNQAKAQRPDFCLEPPYTGPCKARIIRYFYNA"
    )
    with pytest.raises(KeyError, match="no protein 'P99999'"):
        find_protein("P99999")


def test_the_sample_loads_cropped_and_concatenated():
    cropped = load_proteins("sample", length=1021)
    assert max(max(getattr(cropped, name).lengths) for name in SPLITS) == 1021
    summary = cropped.summary()
    assert sum(summary[f"{name}_sequences"] for name in SPLITS) == summary["proteins"] == 4800
    windows = load_proteins("sample", length=8192, concatenate=True)
    for name in SPLITS:
        assert set(getattr(windows, name).lengths) == {8192}
