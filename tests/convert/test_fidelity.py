"""Fidelity: the numbers of its definition, whatever the batches."""

import pytest
import torch
from tiny_models import WORDS, bert, llama

from performers.convert.fidelity import measure_fidelity


@pytest.mark.parametrize("sizes", [[6], [1, 3, 2]])
@torch.no_grad()
def test_a_language_model_is_measured_by_its_predictions(sizes):
    model, exact = llama(), llama()
    tokens = torch.randint(5, WORDS, (6, 13))
    found = measure_fidelity(model, exact, [{"input_ids": x} for x in tokens.split(sizes)])
    ours, theirs = (one(tokens).logits.double() for one in (model.eval(), exact))
    log_ratio = theirs.log_softmax(-1) - ours.log_softmax(-1)
    divergence = (theirs.softmax(-1) * log_ratio).sum(-1).mean()
    assert found.distance == pytest.approx(float(divergence), rel=1e-4)
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    assert found.agreement == pytest.approx(float(same))
    itself = measure_fidelity(exact, exact, [{"input_ids": tokens}])
    assert (itself.distance, itself.agreement) == (pytest.approx(0, abs=1e-6), 1)


@torch.no_grad()
def test_an_encoder_is_measured_by_its_embeddings():
    model, exact = bert(hidden_dropout_prob=0.5).train(), bert()
    tokens = torch.randint(5, WORDS, (6, 13))
    found = measure_fidelity(model, exact, [{"input_ids": x} for x in tokens.split([4, 2])])
    assert model.training
    model.eval()
    ours, theirs = (one(tokens).last_hidden_state.double().mean(1) for one in (model, exact))
    cosine = (ours * theirs).sum(1) / ours.norm(dim=1) / theirs.norm(dim=1)
    assert found.distance == pytest.approx(float(1 - cosine.mean()), rel=1e-3, abs=1e-6)
    assert found.agreement is None
