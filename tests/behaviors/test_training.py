"""Losses, gradients and training."""

import pytest
import torch
from behavior_table import GENERATING, NAMES, SUBJECTS, behavior
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

SECTION = "Training"
PREDICTS_NO_NEXT_TOKEN = {
    name: "predicts no next token" for name in NAMES if name not in GENERATING
}
NO_IGNORED_LABELS = {
    "PerformerForSequenceClassification": "classifies whole sequences",
    "ViT": "classifies whole images",
}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@behavior(SECTION, "steps of an optimizer lower the loss")
def test_loss_falls(subject):
    model, inputs = subject.model(initializer_range=0.02).train(), subject.labeled()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@behavior(SECTION, "every weight gets a gradient")
def test_gradients(subject):
    model = subject.model().train()
    found = gradients(model, subject.labeled())
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("is_reentrant", [False, True])
@behavior(SECTION, "gradient checkpointing changes no gradient")
def test_checkpointing(subject, is_reentrant):
    model, inputs = subject.model().train(), subject.labeled()
    expected = gradients(model, inputs)
    model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
    layer = next(x for x in model.modules() if isinstance(x, GradientCheckpointingLayer))
    runs = []
    layer.register_forward_pre_hook(lambda *_: runs.append(1))
    if is_reentrant:  # which needs an input with a gradient
        model.enable_input_require_grads()
    found = gradients(model, inputs)
    assert runs
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


@behavior(SECTION, "gradient checkpointing is switched on, off, and by a config")
def test_switching_checkpointing(subject):
    model = subject.model()
    layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    assert len(layers) == 2
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert all(layer.gradient_checkpointing for layer in layers)
    model.activation_checkpointing_disable()
    assert not any(layer.gradient_checkpointing for layer in layers)
    assert subject.model(gradient_checkpointing=True).is_activation_checkpointing


@behavior(SECTION, "embeddings can be made to require gradients")
def test_input_gradients(subject):
    model = subject.model().train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    out = model(**subject.inputs(), output_hidden_states=True)
    assert out.hidden_states[0].requires_grad
    model.disable_input_require_grads()
    assert not model(**subject.inputs()).logits.requires_grad


@behavior(
    SECTION,
    "the loss is the mean cross-entropy of labels other than −100",
    without=NO_IGNORED_LABELS,
)
def test_loss(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    labels = subject.labeled()["labels"].where(torch.arange(11) % 3 != 1, -100)
    out = model(tokens, labels=labels)
    logits, wanted = out.logits, labels
    if subject.generates:
        logits, wanted = logits[:, :-1], wanted[:, 1:]
    chosen = wanted != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[chosen], wanted[chosen]))


@behavior(
    SECTION, "labels that were shifted before take their place", without=PREDICTS_NO_NEXT_TOKEN
)
def test_shifted_labels(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    shifted = F.pad(tokens[:, 1:], (0, 1), value=-100)
    loss = model(tokens, labels=tokens.flip(1), shift_labels=shifted).loss
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)


@behavior(
    SECTION,
    "losses of parts over the number of all labels sum to the loss of the whole",
    without=PREDICTS_NO_NEXT_TOKEN,
)
def test_parts_of_a_batch(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    count = torch.tensor(3 * 10)
    parts = [model(row, labels=row, num_items_in_batch=count).loss for row in tokens.split(1)]
    torch.testing.assert_close(sum(parts), model(tokens, labels=tokens).loss)


PROBLEMS = {
    "regression": (1, torch.randn(3)),
    "single_label_classification": (3, torch.tensor([0, 2, 1])),
    "multi_label_classification": (3, torch.tensor([[0.0, 1.0, 1.0]] * 3)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@behavior(
    SECTION,
    "heads for regression, one label and several labels train",
    without={
        subject.name: "has no head for whole sequences"
        for subject in SUBJECTS
        if subject.classifier is None
    },
)
def test_problem_types(subject, problem):
    num_labels, labels = PROBLEMS[problem]
    config = subject.config(num_labels=num_labels, problem_type=problem)
    model = subject.convert(subject.classifier(config))
    loss = model(**subject.inputs(), labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.num_labels == num_labels


@behavior(SECTION, "weights start at 0, at 1, or random with the spread that the config names")
def test_initialization(subject):
    model = subject.model(initializer_range=1e-10)
    for name, weight in model.named_parameters():
        mean = weight.mean().item()
        assert min(abs(mean), abs(mean - 1)) < 1e-6, name


@behavior(SECTION, "training goes through torch.compile")
@pytest.mark.slow
def test_compiled_training(subject):
    model, inputs = subject.model().train(), subject.labeled()
    expected = gradients(model, inputs)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    for name, gradient in gradients(model, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)
