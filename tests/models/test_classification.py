"""Heads for whole sequences, for tokens and for pairs of sequences."""

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from performers.models import (
    PerformerForSequenceClassification,
    PerformerForSequencePairClassification,
    PerformerForTokenClassification,
)

HEADS = [PerformerForSequenceClassification, PerformerForTokenClassification]
PROBLEMS = {
    "regression": (1, torch.tensor([0.5, -1.0, 2.0])),
    "single_label_classification": (5, torch.tensor([0, 4, 2])),
    "multi_label_classification": (5, torch.tensor([[0.0, 1, 1, 0, 0], [1.0] * 5, [0.0] * 5])),
}
LOSSES = {
    "regression": lambda logits, labels: (logits[:, 0] - labels).square().mean(),
    "single_label_classification": F.cross_entropy,
    "multi_label_classification": F.binary_cross_entropy_with_logits,
}
each_problem = pytest.mark.parametrize("problem", PROBLEMS)


@pytest.fixture
def mask(tokens):
    """Padding on the left of one row and on the right of another."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_sequence_is_the_mean_of_its_tokens_or_the_last_that_has_seen_all(
    tiny_model, tokens, mask, is_decoder
):
    model = tiny_model(PerformerForSequenceClassification, num_labels=5, is_decoder=is_decoder)
    hidden = model.performer(tokens, attention_mask=mask).last_hidden_state
    real = [row[seen] for row, seen in zip(hidden, mask.bool(), strict=True)]
    vectors = torch.stack([row[-1] if is_decoder else row.mean(dim=0) for row in real])
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits, model.classifier(vectors))


@pytest.mark.parametrize("is_decoder", [False, True])
def test_a_sequence_of_padding_is_finite(tiny_model, tokens, is_decoder):
    model = tiny_model(PerformerForSequenceClassification, is_decoder=is_decoder)
    logits = model(tokens, attention_mask=torch.zeros_like(tokens)).logits
    assert torch.equal(logits, model.classifier.bias.expand(3, -1))


@pytest.mark.parametrize("is_named", [False, True])
@each_problem
def test_the_loss_of_a_sequence_is_that_of_its_problem(tiny_model, tokens, problem, is_named):
    num_labels, labels = PROBLEMS[problem]
    given = problem if is_named else None
    model = tiny_model(
        PerformerForSequenceClassification, num_labels=num_labels, problem_type=given
    )
    out = model(tokens, labels=labels)
    assert out.logits.shape == (3, num_labels)
    torch.testing.assert_close(out.loss, LOSSES[problem](out.logits, labels))


def test_the_loss_of_tokens_is_the_mean_cross_entropy_of_what_is_labeled(tiny_model, tokens):
    model = tiny_model(PerformerForTokenClassification, num_labels=5)
    labels = (tokens % 5).where(torch.rand(3, 11) < 0.6, -100)
    out = model(tokens, labels=labels)
    assert out.logits.shape == (3, 11, 5)
    chosen = labels != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[chosen], labels[chosen]))
    parts = [
        model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=chosen.sum())
        for row in range(3)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), out.loss)


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_reaches_the_output(tiny_model, tokens, model_class, side):
    model = tiny_model(model_class, num_labels=5)
    padding = (6, 0) if side == "left" else (0, 6)
    padded, mask = F.pad(tokens, padding, value=7), F.pad(torch.ones_like(tokens), padding)
    logits = model(padded, attention_mask=mask).logits
    if model_class is PerformerForTokenClassification:
        logits = logits[mask.bool()].unflatten(0, (3, 11))
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_pair_is_compared_through_two_vectors_their_product_and_their_difference(
    tiny_model, tokens, mask
):
    model = tiny_model(PerformerForSequencePairClassification, num_labels=2)
    second = torch.randint(31, (3, 7))
    labels = torch.tensor([0, 1, 1])
    out = model(tokens, second, attention_mask=mask, labels=labels)
    u = torch.stack(
        [
            model.performer(row[None, seen]).last_hidden_state[0].mean(dim=0)
            for row, seen in zip(tokens, mask.bool(), strict=True)
        ]
    )
    v = model.performer(second).last_hidden_state.mean(dim=1)
    hidden = F.gelu(F.linear(torch.cat([u, v, u * v, u - v], dim=1), model.comparison.weight))
    logits = F.linear(hidden, model.classifier.weight)  # biases start at 0
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    ahead = model.compare(model.encode(tokens, mask), model.encode(second))
    assert torch.equal(ahead, out.logits)


@pytest.mark.usefixtures("without_shape_checks")
def test_labels_for_another_number_of_sequences_are_refused(tiny_model, tokens):
    for model_class, inputs in (
        (PerformerForSequenceClassification, (tokens,)),
        (PerformerForSequencePairClassification, (tokens, tokens)),
    ):
        with pytest.raises(ValueError, match=r"one entry, or row, per sequence: got \(2,\) for 3"):
            tiny_model(model_class)(*inputs, labels=torch.tensor([0, 1]))


CLASSES = [*HEADS, PerformerForSequencePairClassification]


def inputs_of(model_class, tokens):
    if model_class is PerformerForSequencePairClassification:
        return {"input_ids": tokens, "second_input_ids": tokens.flip(1)}
    return {"input_ids": tokens}


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_reloaded_model_gives_bit_identical_output(tiny_model, tokens, tmp_path, model_class):
    model = tiny_model(model_class, num_labels=5)
    model.save_pretrained(tmp_path)
    torch.manual_seed(11)
    again = model_class.from_pretrained(tmp_path)
    inputs = inputs_of(model_class, tokens)
    assert again.config.num_labels == 5
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", CLASSES)
def test_the_trainer_learns_what_can_be_learned(tiny_model, tokens, tmp_path, model_class):
    labels = torch.tensor([0, 4, 2])
    if model_class is PerformerForTokenClassification:
        labels = tokens % 5
    inputs = inputs_of(model_class, tokens)
    model = tiny_model(model_class, num_labels=5, initializer_range=0.1)
    before = model(**inputs, labels=labels).loss.item()
    rows = [
        {name: x[row] for name, x in inputs.items()} | {"labels": labels[row]} for row in range(3)
    ]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=12,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.eval()(**inputs, labels=labels).loss.item() < before / 2
