import pytest
import torch

from performers.data import (
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    MASK_TOKEN_ID,
    NOT_SCORED,
    PAD_TOKEN_ID,
    CausalCollator,
    MaskedCollator,
    crop_sequences,
    encode,
    mask_tokens,
)
from performers.data.vocabulary import AMINO_ACID_IDS


def random_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(AMINO_ACID_IDS.start, AMINO_ACID_IDS.stop, (rows, length))


def assert_rate(count: int, trials: int, probability: float) -> None:
    """A binomial count within four standard errors of its mean."""
    standard_error = (probability * (1 - probability) / trials) ** 0.5
    assert abs(count / trials - probability) < 4 * standard_error


@pytest.mark.parametrize("mask_rate", [0.15, 0.4])
def test_15_percent_are_scored_and_80_10_10_of_them_masked_replaced_kept(mask_rate):
    ids = random_ids(401, 509)
    masked, labels = mask_tokens(ids, seed=3, mask_rate=mask_rate)
    scored = labels != NOT_SCORED
    num_scored = int(scored.sum())
    assert_rate(num_scored, ids.numel(), mask_rate)
    assert_rate(int((masked[scored] == MASK_TOKEN_ID).sum()), num_scored, 0.8)
    # A random amino acid is the one that stood there once in 25.
    other = (masked != MASK_TOKEN_ID) & (masked != ids)
    assert_rate(int(other.sum()), num_scored, 0.1 * 24 / 25)


def test_replacements_are_uniform_over_the_amino_acids():
    ids = random_ids(401, 509)
    masked, _ = mask_tokens(ids, seed=5, mask_rate=0.9)
    replaced = masked[(masked != MASK_TOKEN_ID) & (masked != ids)]
    counts = torch.bincount(replaced, minlength=AMINO_ACID_IDS.stop)
    for token in AMINO_ACID_IDS:
        assert_rate(int(counts[token]), len(replaced), 1 / 25)


@pytest.mark.parametrize("distance", [1, 2, 31])
def test_neighbouring_positions_rows_seeds_and_epochs_are_masked_independently(distance):
    ids = random_ids(401, 509)

    def scored(seed=0, epoch=0):
        return mask_tokens(ids, seed, epoch)[1] != NOT_SCORED

    chosen = scored()
    for other, reference in (
        (chosen[:, distance:], chosen[:, :-distance]),
        (chosen[distance:], chosen[:-distance]),
        (scored(seed=distance), chosen),
        (scored(epoch=distance), chosen),
        (scored(seed=distance), scored(epoch=distance)),
    ):
        assert_rate(int((other & reference).sum()), reference.numel(), 0.15**2)


def test_unscored_positions_keep_their_token_and_labels_are_the_originals():
    ids = random_ids(7, 211)
    masked, labels = mask_tokens(ids, seed=1)
    scored = labels != NOT_SCORED
    assert torch.equal(labels[scored], ids[scored])
    assert torch.equal(masked[~scored], ids[~scored])


def test_special_tokens_are_never_masked_or_scored():
    ids = random_ids(101, 13)
    special = torch.tensor([PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, MASK_TOKEN_ID])
    ids[:, :4] = special
    masked, labels = mask_tokens(ids, seed=1, mask_rate=0.9)
    assert torch.equal(masked[:, :4], special.expand(101, 4))
    assert (labels[:, :4] == NOT_SCORED).all()


def test_every_row_with_an_amino_acid_has_a_label():
    labels = mask_tokens(random_ids(997, 2), seed=1)[1]
    assert (labels != NOT_SCORED).any(dim=1).all()
    special_only = torch.full((3, 5), EOS_TOKEN_ID)
    assert (mask_tokens(special_only, seed=1)[1] == NOT_SCORED).all()


def test_the_mask_of_a_protein_depends_on_nothing_but_seed_epoch_and_protein():
    dataset = crop_sequences(["MKV" * 7, "ACDEFGHIKLW" * 5, "WYWYV", "MSTNPKPQRKTK"], 61)
    items = [dataset[i] for i in range(4)]
    collator = MaskedCollator(seed=11)
    collator.set_epoch(2)
    together = collator(items)
    reordered = collator([items[i] for i in (2, 0, 3, 1)])
    again = MaskedCollator(seed=11, epoch=2, pad_to_multiple_of=64)
    for row, place in enumerate((1, 3, 0, 2)):
        alone = again([items[row]])
        length = len(items[row]["input_ids"])
        for name in ("input_ids", "labels"):
            expected = together[name][row, :length]
            assert torch.equal(reordered[name][place, :length], expected)
            assert torch.equal(alone[name][0, :length], expected)


def test_one_changed_letter_changes_the_mask():
    ids = random_ids(1, 499)
    changed = ids.clone()
    changed[0, -1] = AMINO_ACID_IDS.start + (changed[0, -1] - 3).remainder(25)
    chosen, other = (mask_tokens(x, seed=1)[1][0, :-1] != NOT_SCORED for x in (ids, changed))
    assert not torch.equal(chosen, other)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5])
def test_any_whole_number_is_a_seed(seed):
    labels = mask_tokens(random_ids(11, 97), seed=seed)[1]
    assert_rate(int((labels != NOT_SCORED).sum()), 11 * 97, 0.15)


def test_masks_are_the_same_on_every_machine_and_in_every_version():
    labels = mask_tokens(encode("MKVLLWYACDEFGHIKLMNPQRST" * 3)[None], seed=7, epoch=1)[1]
    scored = [1, 6, 18, 20, 43, 45, 46, 52, 53, 56, 58, 66, 67, 69, 71]
    assert (labels[0] != NOT_SCORED).nonzero().squeeze(1).tolist() == scored


@pytest.mark.parametrize("collator", [MaskedCollator(), CausalCollator()])
def test_batches_are_padded_on_the_right_as_transformers_expects(collator):
    dataset = crop_sequences(["MKVLA", "MKV"], 1024)
    batch = collator([dataset[0], dataset[1]])
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert (batch["input_ids"][1, 5:] == PAD_TOKEN_ID).all()
    assert (batch["labels"][1, 5:] == NOT_SCORED).all()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("collator_class", [MaskedCollator, CausalCollator])
def test_the_length_is_rounded_up_to_the_multiple_asked_for(collator_class):
    dataset = crop_sequences(["MKVLA"], 1024)
    batch = collator_class(pad_to_multiple_of=8)([dataset[0]])
    assert batch["input_ids"].shape == (1, 8)


def test_next_token_labels_are_the_tokens_after_the_first():
    dataset = crop_sequences(["MKV"], 1024)
    batch = CausalCollator()([dataset[0]])
    assert batch["labels"].tolist() == [[NOT_SCORED, *encode("MKV").tolist(), EOS_TOKEN_ID]]


@pytest.mark.parametrize("collator", [MaskedCollator(mask_rate=0.9), CausalCollator()])
def test_labels_are_among_the_tokens_a_collator_says_it_scores(collator):
    dataset = crop_sequences(["ACDEFGHIKLMNPQRSTVWYBOUXZ"], 1024)
    labels = collator([dataset[0]])["labels"]
    assert set(labels[labels != NOT_SCORED].tolist()) <= set(collator.scored_token_ids)


@pytest.mark.parametrize("mask_rate", [0.0, 1.0, -0.1])
def test_a_mask_rate_outside_0_and_1_is_refused(mask_rate):
    with pytest.raises(ValueError, match="mask_rate must be between 0 and 1"):
        MaskedCollator(mask_rate=mask_rate)
