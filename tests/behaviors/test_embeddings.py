"""The embeddings of a vocabulary and of positions."""

import torch
from behavior_table import CLASSIFIERS, NAMES, WORDS, Refused, behavior
from torch import nn

SECTION = "Embeddings"
NO_WORDS = {"ViT": "images have no vocabulary"}
NO_HEAD = dict.fromkeys(CLASSIFIERS, "has no head over words") | NO_WORDS
FIXED_POSITIONS = Refused(
    "transformers has the method for a few old architectures alone; build the model with another "
    "`max_position_embeddings`",
    NotImplementedError,
    "resize_position_embeddings",
)


@behavior(SECTION, "input and output embeddings are found and replaced", without=NO_HEAD)
def test_get_and_set(subject):
    model = subject.model()
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    other = nn.Embedding(WORDS, 32)
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    head = nn.Linear(32, WORDS)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


@behavior(SECTION, "a vocabulary grows and shrinks with its head and its config", without=NO_HEAD)
def test_resizing(subject):
    for is_tied in (True, False):
        model, tokens = subject.model(tie_word_embeddings=is_tied), subject.inputs()["input_ids"]
        before = model(tokens).logits
        old = model.get_input_embeddings().weight.clone()
        model.resize_token_embeddings(WORDS + 10)
        assert model.config.vocab_size == WORDS + 10
        assert torch.equal(model.get_input_embeddings().weight[:WORDS], old)
        logits = model(tokens, labels=tokens).logits
        assert logits.shape[-1] == WORDS + 10
        torch.testing.assert_close(logits[..., :WORDS], before, rtol=1e-4, atol=1e-4)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
            is_tied
        )
        model.resize_token_embeddings(WORDS - 3, pad_to_multiple_of=8)
        assert model(tokens.clamp(max=90)).logits.shape[-1] == 96
        model.resize_token_embeddings(pad_to_multiple_of=64)
        assert model.config.vocab_size == 128


@behavior(SECTION, "a vocabulary that was resized is saved and loaded", without=NO_WORDS)
def test_resized_and_saved(subject, tmp_path):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    model.resize_token_embeddings(WORDS + 5)
    model.save_pretrained(tmp_path)
    assert torch.equal(subject.loaded(tmp_path)(tokens).logits, model(tokens).logits)


@behavior(
    SECTION,
    "the table of positions can be resized",
    refused=dict.fromkeys(NAMES, FIXED_POSITIONS),
)
def test_positions(subject):
    subject.model().resize_position_embeddings(23)
