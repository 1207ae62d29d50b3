import math

import pytest
import torch

from performers.data import (
    NOT_SCORED,
    CausalCollator,
    EmpiricalBaseline,
    MaskedCollator,
    crop_sequences,
    load_proteins,
)

COLLATORS = [MaskedCollator(seed=3), CausalCollator()]


@pytest.fixture(scope="module")
def splits():
    return load_proteins("sample", length=257)


@pytest.mark.parametrize("collator", COLLATORS)
def test_the_baseline_is_a_distribution_over_what_can_be_scored(splits, collator):
    baseline = EmpiricalBaseline.fit(splits.train, collator.scored_token_ids)
    probabilities = baseline.log_probabilities.exp()
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.nonzero().squeeze(1).tolist() == list(collator.scored_token_ids)


@pytest.mark.parametrize("collator", COLLATORS)
def test_the_metrics_are_those_of_a_model_with_constant_logits(splits, collator):
    baseline = EmpiricalBaseline.fit(splits.train, collator.scored_token_ids)
    metrics = baseline.evaluate(splits.valid, collator)
    labels = collator([splits.valid[i] for i in range(len(splits.valid))])["labels"]
    labels = labels[labels != NOT_SCORED]
    logits = baseline.log_probabilities.expand(len(labels), -1)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics["num_scored"] == len(labels)
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss))
    assert metrics["bits_per_character"] == pytest.approx(loss / math.log(2))
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_the_baseline_of_real_proteins_is_near_the_papers(splits):
    # Table 2: accuracy 9.92 % and perplexity 17.80 on TrEMBL.
    baseline = EmpiricalBaseline.fit(splits.train, MaskedCollator().scored_token_ids)
    metrics = baseline.evaluate(splits.test, MaskedCollator())
    assert 0.08 < metrics["accuracy"] < 0.12
    assert 17 < metrics["perplexity"] < 19
    assert max(baseline.frequencies().items(), key=lambda item: item[1])[0] == "L"


def test_a_letter_that_only_the_evaluation_set_has_leaves_the_perplexity_finite():
    collator = CausalCollator()
    baseline = EmpiricalBaseline.fit(crop_sequences(["MKV"], 17), collator.scored_token_ids)
    metrics = baseline.evaluate(crop_sequences(["WWW"], 17), collator)
    # 4 tokens and one more for each of the 26 kinds: W has 1/30, <eos> 2/30.
    assert metrics["loss"] == pytest.approx((3 * math.log(30) + math.log(15)) / 4)


def test_nothing_scored_is_an_error():
    baseline = EmpiricalBaseline.fit(crop_sequences(["MKV"], 17), (4, 5))
    with pytest.raises(ValueError, match="at least one scored position"):
        baseline.evaluate(crop_sequences([], 17), CausalCollator())
