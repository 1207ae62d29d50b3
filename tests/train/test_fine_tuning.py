"""Fine-tuning after a conversion undoes an error, and does nothing where there is none."""

import copy
import itertools
import math

import pytest
import torch
from tiny_models import WORDS, bert, llama
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from performers.convert import measure_fidelity
from performers.convert.sequences import Sequences
from performers.models import PerformerConfig
from performers.train import fine_tuning
from performers.train.fine_tuning import fine_tune
from performers.train.fine_tuning_task import ENCODER, TASKS_OF, fine_tuning_task


def tokens():
    return Sequences({"input_ids": torch.randint(5, WORDS, (6, 13))})


@pytest.mark.parametrize("name", ["PerformerForCausalLM", "PerformerForMaskedLM"])
def test_a_performer_is_not_converted_again(name):
    with pytest.raises(ValueError, match="this one is a Performer already"):
        fine_tuning_task(PerformerConfig(architectures=[name]))


def test_a_model_that_equals_its_teacher_is_left_as_it_is(tmp_path):
    """Its loss is 0, as long as no dropout disturbs it."""
    model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    before = copy.deepcopy(model.state_dict())
    distances = itertools.count(0, -1)  # each step comes closer, so that the last weights are kept
    fine_tune(
        model, copy.deepcopy(model), ENCODER, tokens(), None, tmp_path,
        steps=2, batch_size=3, learning_rate=1e-2, lora_rank=0, seed=0,
        measure=lambda model: float(next(distances)),
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_fine_tuning_that_diverges_says_what_to_lower(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(FloatingPointError, match=r"diverged.*with a lower learning_rate\."):
        fine_tune(
            bert(), bert(), ENCODER, tokens(), None, tmp_path,
            steps=9, batch_size=3, learning_rate=1e30, lora_rank=0, seed=0,
            measure=lambda model: 0.0,
        )  # fmt: skip


def weight_of(model):
    return model.base_model.embeddings.word_embeddings.weight.detach().clone()


def trained(folder, distances, steps, **options):
    """A model after fine-tuning in which these distances were measured, and its weights then."""
    torch.manual_seed(0)
    model, teacher, seen = bert(), bert(), []

    def measure(model):
        seen.append(weight_of(model))
        return distances[len(seen) - 1]

    model = fine_tune(
        model, teacher, ENCODER, tokens(), None, folder,
        steps=steps, batch_size=3, learning_rate=1e-2, lora_rank=0, seed=0, measure=measure,
        **options,
    )  # fmt: skip
    return model, seen


@pytest.mark.parametrize("best", [0, 2, 4])
def test_the_weights_that_were_closest_to_the_exact_model_are_kept(best, tmp_path):
    distances = [float(abs(step - best) + 1) for step in range(5)]
    model, seen = trained(tmp_path, distances, steps=4)
    assert torch.equal(weight_of(model), seen[best])
    assert not any(torch.equal(seen[best], other) for i, other in enumerate(seen) if i != best)


def test_fine_tuning_ends_where_it_no_longer_brings_the_model_closer(tmp_path):
    distances = [5.0, 3.0, 4.0, math.nan, 3.0, 2.0, 1.0]  # as small again is no improvement
    model, seen = trained(tmp_path, distances, steps=10)
    assert len(seen) == 5  # one that is better, then three that are no improvement
    assert torch.equal(weight_of(model), seen[1])


@pytest.mark.parametrize(("sequences", "measured"), [(0, 11), (3, 6), (12, 3), (300, 2)])
def test_measuring_takes_at_most_a_quarter_as_long_as_training(sequences, measured, tmp_path):
    """Two forward passes of what is measured, beside four of each step's three sequences."""
    _, seen = trained(tmp_path, [float(-n) for n in range(11)], 10, measured_sequences=sequences)
    assert len(seen) == measured  # before the first step and after the last one too
    between = measured - 2
    assert between * 2 * sequences <= 0.25 * 10 * 4 * 3


def test_an_interrupted_fine_tuning_keeps_the_same_weights(tmp_path, monkeypatch):
    distances = [5.0, 3.0, 4.0, 3.5, 2.0, 2.5]
    whole, _ = trained(tmp_path / "whole", distances, steps=5)

    def interrupt(*arguments, **names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning.KeepBest, "load", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "parts", distances, steps=5)
    parts, seen = trained(tmp_path / "parts", [], steps=5)
    assert seen == []  # all steps are done
    assert torch.equal(weight_of(parts), weight_of(whole))


@pytest.mark.parametrize("kind", ["encoder", "causal-lm"])
def test_what_is_learned_is_the_exact_model_and_padding_teaches_nothing(kind):
    model, teacher = (bert(), bert()) if kind == "encoder" else (llama(), llama())
    (task,) = (task for task in TASKS_OF if task.name == kind)
    ids = torch.randint(5, WORDS, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    assert float(task.loss(teacher, teacher, batch).detach()) == pytest.approx(0, abs=1e-6)
    found = task.loss(model, teacher, batch)
    other = batch | {"input_ids": ids.masked_fill(mask == 0, 7)}
    torch.testing.assert_close(task.loss(model, teacher, other), found, rtol=1e-4, atol=1e-5)
    if kind == "causal-lm":
        short = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :7]}]
        parts = [measure_fidelity(model, teacher, [part]).distance for part in short]
        assert float(found) == pytest.approx((13 * parts[0] + 7 * parts[1]) / 20, rel=1e-3)


def test_the_loss_of_a_task_counts_labels_and_not_batches():
    model = llama()
    (task,) = (task for task in TASKS_OF if task.name == "causal-lm")
    rows = [torch.randint(5, WORDS, (n,)) for n in (13, 7, 3)]
    padded = Sequences(
        {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True),
        }
    )
    items = task.examples(padded, None, seed=0)
    batches = [default_collate(items[:1]), default_collate(items[1:])]
    losses = [float(model(row[None], labels=row[None]).loss) for row in rows]
    expected = sum(x * n for x, n in zip(losses, (12, 6, 2), strict=True)) / 20
    assert task.task_loss(model, batches) == pytest.approx(expected, rel=1e-4)
