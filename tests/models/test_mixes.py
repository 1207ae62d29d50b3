"""Mixes: a mechanism per layer, and several in the heads of one layer."""

import pytest
import torch

from performers.baselines import LocalAttention, LocalOptions
from performers.models import (
    MECHANISMS,
    PerformerCache,
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
)
from performers.models.mixes import attention_words, build_attention
from performers.nn.mechanisms import Exact, Favor

SIDE_BY_SIDE = {
    "attention": {"performer-relu": 4, "local": 2},
    "attention_options": {"local": {"window_size": 3}},
    "num_attention_heads": 6,
}


@pytest.mark.parametrize("key_heads", [6, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_each_group_of_heads_attends_as_its_mechanism_does_alone(
    tiny_config, key_heads, is_causal, is_reversed
):
    heads = SIDE_BY_SIDE["attention"]
    options = dict(reversed(heads.items())) if is_reversed else heads
    config = tiny_config(
        **SIDE_BY_SIDE | {"attention": options}, num_key_value_heads=key_heads, position="none"
    )
    query = torch.randn(2, 6, 11, 4)
    key, value = torch.randn(2, 2, key_heads, 11, 4).unbind()
    masks = {"is_causal": is_causal, "key_padding_mask": torch.arange(11).expand(2, -1) > 1}
    out = build_attention(config, 1)(query, key, value, **masks)
    # The alphabet decides, not the mapping, because a saved config has its keys sorted.
    local, last = LocalAttention(LocalOptions(window_size=3)), key_heads // 3
    favor = MECHANISMS["performer-relu"].build(tiny_config(num_attention_heads=6), 1)
    expected = [
        local(query[:, :2], key[:, :last], value[:, :last], **masks),
        favor(query[:, 2:], key[:, last:], value[:, last:], **masks),
    ]
    torch.testing.assert_close(out, torch.cat(expected, dim=1))


def test_each_layer_attends_by_its_own_entry(tiny_model):
    model = tiny_model(PerformerForMaskedLM, attention=["exact", {"performer-relu": 3}])
    first, last = (layer.attention.mechanism for layer in model.performer.layers)
    assert isinstance(first, Exact)
    assert isinstance(last, Favor)
    assert (last.feature_map.fn, last.feature_map.layer) == ("relu", 1)


def test_a_saved_mix_comes_back_with_the_same_outputs(tiny_model, tokens, tmp_path):
    options = SIDE_BY_SIDE | {"attention": ["linformer", SIDE_BY_SIDE["attention"]]}
    options["attention_options"] = {"linformer": {"num_projections": 5}, "local": None}
    model = tiny_model(PerformerForMaskedLM, **options, position="none")
    model.redraw_features()
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path).eval()
    assert again.config.attention == model.config.attention
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_window_is_for_the_mechanisms_that_take_one(tiny_model):
    model = tiny_model(
        PerformerForCausalLM, attention=["exact", "performer-positive"], window_size=5
    )
    assert model.performer.layers[1].attention.mechanism.window_size == 5


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_mix_writes_the_same_with_and_without_a_cache(tiny_model, tokens, num_beams):
    mix = ["performer-positive", SIDE_BY_SIDE["attention"]]
    options = SIDE_BY_SIDE | {"attention": mix, "window_size": 3, "position": "learned"}
    model = tiny_model(PerformerForCausalLM, **options)
    mask = torch.arange(11) > torch.tensor([[-1], [1], [2]])
    written, again = (
        model.generate(
            tokens, attention_mask=mask, do_sample=False, num_beams=num_beams, max_new_tokens=7,
            use_cache=cache,
        )
        for cache in (True, False)
    )  # fmt: skip
    assert torch.equal(written, again)


def test_side_by_side_tokens_are_taken_back_where_every_mechanism_can(tiny_model, tokens):
    model = tiny_model(PerformerForCausalLM, attention={"exact": 2, "local": 1})
    cache = PerformerCache(model.config)
    model(tokens, past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 7
    again = model(tokens[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens).logits[:, 7:], rtol=1e-4, atol=1e-4)

    linear = tiny_model(PerformerForCausalLM, attention={"exact": 2, "performer-relu": 1})
    with pytest.raises(NotImplementedError, match="cannot give the last ones back"):
        linear.generate(tokens[:1], prompt_lookup_num_tokens=3, max_new_tokens=5)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": ["exact"]}, "one entry per layer: got 1 for num_hidden_layers=2"),
        ({"attention": ["exact", "lokal"]}, "unknown attention 'lokal'.* mean 'local'"),
        ({"attention": ["exact", ["local"]]}, r"unknown attention \['local'\]: choose one of"),
        ({"attention": {"exact": 1, "lokal": 2}}, "unknown attention 'lokal'.* mean 'local'"),
        ({"attention": {"exact": 3, "local": 0}}, "heads of 'local' .* at least 1, got 0"),
        ({"attention": {"exact": "3"}}, "heads of 'exact' in attention must be a whole number"),
        ({"attention": {"exact": 1, "local": 1}}, "must be all of the layer: got .*_heads=3"),
        ({"attention": {}}, r"must be all of the layer: got \{\}"),
        ({"attention": 3}, "unknown attention 3"),
        (
            {"attention": {"exact": 1, "local": 2}, "num_key_value_heads": 1},
            "here 3 do, so each number of heads in attention must be a multiple of 3, got",
        ),
        (
            {"attention": {"exact": 3}, "attention_options": {"local": {"window_size": 3}}},
            "mapping of its mechanisms to their options, .* got 'local'",
        ),
        (
            {"attention": {"local": 3}, "attention_options": {"window_size": 3}},
            "mapping of its mechanisms to their options, .* got 'window_size': 3",
        ),
        (
            {"attention": {"local": 3}, "attention_options": {"local": {"windw_size": 3}}},
            "unknown option of attention='local' 'windw_size'.* mean 'window_size'",
        ),
        (
            {"attention": ["exact", {"linformer": 1, "local": 2}], "is_decoder": True},
            "attention='linformer' cannot be causal",
        ),
        (
            {"attention": ["exact", "local"], "window_size": 5},
            r"it needs attention in .*, got attention=\['exact', 'local'\]",
        ),
        (
            {"attention": {"performer-positive": 3}, "projection": None},
            "need random projections",
        ),
        ({"attention": {"local": 2, "performer-relu": 1}, "dialect": {}}, "attention='local'"),
    ],
)
def test_a_mix_that_cannot_be_is_refused_by_name(tiny_config, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**options)


def test_a_mix_is_one_word_in_tables():
    assert attention_words(PerformerConfig().attention) == "performer-relu"
    mix = ["exact", {"performer-relu": 6, "local": 2}]
    assert attention_words(mix) == "exact, 2 local + 6 performer-relu"
