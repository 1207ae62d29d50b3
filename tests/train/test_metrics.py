"""Accuracy, perplexity and bits per character, against sums done by hand."""

import math

import pytest
import torch
from transformers import EvalPrediction

from performers.train.metrics import TokenMetrics, score_tokens

# Three tokens; probabilities of a row are 1/2, 1/4, 1/4 in the order of its logits.
HALF, QUARTER = math.log(0.5), math.log(0.25)
FIRST = [HALF, QUARTER, QUARTER]
LAST = [QUARTER, QUARTER, HALF]


def test_masked_positions_alone_are_scored():
    logits = torch.tensor([[FIRST, LAST, FIRST]])
    labels = torch.tensor([[0, -100, 2]])  # right, not scored, wrong
    expected = torch.tensor([[1.0, math.log(2) + math.log(4), 2.0]], dtype=torch.float64)
    torch.testing.assert_close(
        score_tokens(logits, labels, shift=False), expected, check_dtype=True
    )


def test_a_causal_model_is_scored_on_the_next_token():
    logits = torch.tensor([[LAST, FIRST, FIRST]])
    labels = torch.tensor([[-100, 2, 1]])  # LAST predicts 2, FIRST does not predict 1
    expected = torch.tensor([[1.0, math.log(2) + math.log(4), 2.0]], dtype=torch.float64)
    torch.testing.assert_close(score_tokens(logits, labels, shift=True), expected)


def test_metrics_are_means_over_tokens_not_over_batches():
    metrics = TokenMetrics()
    batches = [
        (torch.tensor([[FIRST], [FIRST]]), torch.tensor([[0], [0]])),
        (torch.tensor([[LAST]]), torch.tensor([[0]])),
    ]
    for number, (logits, labels) in enumerate(batches):
        prediction = EvalPrediction(score_tokens(logits, labels, shift=False), labels)
        result = metrics(prediction, compute_result=number == 1)
    loss = (2 * math.log(2) + math.log(4)) / 3
    assert result == pytest.approx(
        {
            "accuracy": 2 / 3,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_character": 4 / 3,
            "num_scored": 3,
        }
    )


def test_one_evaluation_does_not_reach_into_the_next():
    metrics = TokenMetrics()
    first = EvalPrediction(torch.tensor([[5.0, 0.0, 5.0]]), None)
    second = EvalPrediction(torch.tensor([[0.0, 7.0, 7.0]]), None)
    metrics(first, compute_result=True)
    assert metrics(second, compute_result=True)["accuracy"] == 0


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="must score at least one token"):
        TokenMetrics()(EvalPrediction(torch.zeros(1, 3), None), compute_result=True)
