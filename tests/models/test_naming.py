"""A cache goes by two names, of which a version of transformers knows one or the other."""

import pytest
import torch

from performers.models import (
    PerformerCache,
    PerformerConfig,
    PerformerEncoderDecoderCache,
    PerformerEncoderDecoderModel,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerModel,
)
from performers.models.naming import CACHE, CACHE_NAMES, cache_among

SIZES = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
KINDS = {
    PerformerModel: (PerformerCache, {"is_decoder": True}),
    PerformerForCausalLM: (PerformerCache, {}),
    PerformerEncoderDecoderModel: (PerformerEncoderDecoderCache, {"is_encoder_decoder": True}),
    PerformerForConditionalGeneration: (PerformerEncoderDecoderCache, {"is_encoder_decoder": True}),
}


def build(kind):
    make, chosen = KINDS[kind]
    torch.manual_seed(0)
    model = kind(PerformerConfig(**SIZES, num_projections=5, **chosen)).eval()
    return model, make(model.config)


def inputs(model, tokens):
    return {"input_ids": tokens} | (
        {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    )


@pytest.fixture
def tokens():
    return torch.randint(23, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_is_the_same_by_either_name(kind, tokens):
    found = []
    for name in CACHE_NAMES:
        model, cache = build(kind)
        for start in (0, 4):
            out = model(**inputs(model, tokens[:, start : start + 4]), **{name: cache})
        assert getattr(out, CACHE) is cache
        assert cache.get_seq_length() == 7
        found.append(out[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_two_caches_by_two_names_are_refused(kind, tokens, without_shape_checks):
    model, cache = build(kind)
    with pytest.raises(ValueError, match=r"two names of one argument.*Pass one of them"):
        model(**inputs(model, tokens), **dict.fromkeys(CACHE_NAMES, cache))


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_no_cache_by_one_name_leaves_that_by_the_other(name):
    assert cache_among(dict.fromkeys(CACHE_NAMES) | {name: 5}) == 5
    assert cache_among(dict.fromkeys(CACHE_NAMES)) is None is cache_among({})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_layer_that_runs_again_in_the_backward_pass_fills_no_cache(kind, name, tokens):
    model, cache = build(kind)
    model.train().gradient_checkpointing_enable()
    model(**inputs(model, tokens), **{name: cache})[0].sum().backward()
    assert cache.get_seq_length() == 0
