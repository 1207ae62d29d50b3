"""Fidelity: the numbers of its definition, whatever the batches."""

import pytest
import torch
from tiny_models import WORDS, bert, llama

from performers.convert.fidelity import compare_fidelity, measure_fidelity


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
    nearest = [
        (x @ x.T / x.norm(dim=1)).fill_diagonal_(-torch.inf).argmax(dim=1) for x in (ours, theirs)
    ]
    assert found.neighbors == pytest.approx(float((nearest[0] == nearest[1]).double().mean()))
    assert measure_fidelity(exact, exact, [{"input_ids": tokens}]).neighbors == 1
    assert measure_fidelity(exact, exact, [{"input_ids": tokens[:2]}]).neighbors is None


@pytest.mark.parametrize("build", [bert, llama])
@torch.no_grad()
def test_padding_does_not_count(build):
    model, exact = build(), build()
    rows = [torch.randint(5, WORDS, (1, n)) for n in (13, 11, 5, 7)]
    alone = [{"input_ids": row} for row in rows]
    ids = torch.zeros(4, 13, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : row.shape[1]], mask[number, : row.shape[1]] = row[0], 1
    padded = [{"input_ids": ids[half], "attention_mask": mask[half]} for half in ([0, 2], [1, 3])]
    found, expected = (measure_fidelity(model, exact, batches) for batches in (padded, alone))
    assert found.distance == pytest.approx(expected.distance, rel=1e-3)
    assert found.agreement == expected.agreement


@pytest.mark.parametrize("build", [bert, llama])
def test_several_models_are_compared_with_one_pass_of_the_exact_one(build):
    models, exact, calls = {n: build() for n in (3, 7)}, build(), []
    exact.register_forward_hook(lambda *call: calls.append(call))
    batches = [{"input_ids": torch.randint(5, WORDS, (n, 13))} for n in (2, 3)]
    found = compare_fidelity(models, exact, batches)
    assert len(calls) == 2
    assert found == {n: measure_fidelity(model, exact, batches) for n, model in models.items()}
    assert found[3].distance != found[7].distance
