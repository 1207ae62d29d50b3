"""PerformerConfig: the paper's sizes, and what a wrong word or number gets."""

import json
from dataclasses import dataclass

import pytest
import torch
from mechanisms import EVERY
from transformers import AutoConfig

from performers import FavorOptions
from performers.baselines import Identity
from performers.checks import check_count
from performers.functional import KERNELS, favor_attention, softmax_attention
from performers.models import (
    MECHANISMS,
    PerformerCache,
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
)
from performers.models.mechanisms import Mechanism, own_options
from performers.nn import KernelFeatures, SharpFeatures, SoftmaxFeatures
from performers.nn.estimators import ESTIMATORS
from performers.nn.words import FEATURES

# What each word of `attention` stands for, by the functions that it is made of.
DRAWN = {"num_projections": 7, "projection": "iid", "seed": 5, "layer": 3}
ATTENTION = {
    "exact": softmax_attention,
    "identity": lambda query, key, value: value,
    "linear-transformer": lambda *tensors: favor_attention(
        *tensors, KernelFeatures(4, fn="elu+1", epsilon=0.0, projection=None)
    ),
    "performer-sharp": lambda *tensors: favor_attention(
        *tensors, SharpFeatures(4, num_heads=2, statistics="call", query_ratio=2.0, **DRAWN)
    ),
    **{
        f"performer-{estimator}": lambda *tensors, estimator=estimator: favor_attention(
            *tensors, SoftmaxFeatures(4, estimator=estimator, distribution="sphere", **DRAWN)
        )
        for estimator in ESTIMATORS
    },
    **{
        f"performer-{fn}": lambda *tensors, fn=fn: favor_attention(
            *tensors, KernelFeatures(4, fn=fn, epsilon=0.25, distribution="sphere", **DRAWN)
        )
        for fn in KERNELS
    },
}


# What the others stand for, tests/baselines says.
@pytest.mark.parametrize("name", ATTENTION)
def test_a_word_for_attention_stands_for_a_function_with_the_numbers_of_the_config(name):
    config = PerformerConfig(
        attention=name, hidden_size=8, num_attention_heads=2, num_projections=7, projection="iid",
        distribution="gaussian" if name == "performer-sharp" else "sphere", kernel_epsilon=0.25,
        seed=5,
    )  # fmt: skip
    tensors = torch.randn(3, 2, 2, 11, 4).unbind()
    out = MECHANISMS[name].build(config, 3)(*tensors)
    torch.testing.assert_close(out, ATTENTION[name](*tensors))


def test_the_paper_s_mechanism_is_the_default():
    assert PerformerConfig().attention == "performer-relu"


@pytest.mark.parametrize(
    ("size", "heads", "layers", "d_ff", "d"),
    [("regular", 8, 6, 2048, 512), ("small", 1, 6, 64, 64), ("protein", 8, 36, 1024, 512)],
)
def test_named_sizes_have_the_shapes_and_parameter_counts_of_the_paper(
    size, heads, layers, d_ff, d
):
    vocabulary = 29
    with torch.device("meta"):
        model = PerformerForMaskedLM(PerformerConfig.named(size, vocab_size=vocabulary))
    attention = 4 * (d * d + d)
    mlp = (d * d_ff + d_ff) + (d_ff * d + d)
    norms = 2 * 2 * d
    assert model.num_parameters() == layers * (attention + mlp + norms) + 2 * d + vocabulary * d
    assert len(model.performer.layers) == layers
    for layer in model.performer.layers:
        assert layer.attention.mechanism.feature_map.omega.shape == (256, d // heads)
        assert layer.mlp.up_proj.weight.shape == (d_ff, d)


def test_a_named_size_takes_overrides():
    config = PerformerConfig.named("regular", attention="exact", num_hidden_layers=2)
    assert (config.attention, config.num_hidden_layers, config.hidden_size) == ("exact", 2, 512)


def test_a_saved_config_comes_back_equal(tiny_config, tmp_path):
    config = tiny_config(attention="performer-positive", projection="iid", window_size=5, seed=7)
    config.save_pretrained(tmp_path)
    assert PerformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("attention", "performer-rleu", "Did you mean 'performer-relu'"),
        ("attention", "performer", "unknown attention 'performer'"),
        ("position", "rotery", "Did you mean 'rotary'"),
        ("attention", "performer-postive", "Did you mean 'performer-positive'"),
        ("distribution", "gauss", "Did you mean 'gaussian'"),
        ("projection", "orthogonl", "Did you mean 'orthogonal'"),
        ("hidden_act", "gellu", "Did you mean 'gelu'"),
        ("num_projections", 0, "num_projections must be a whole number of at least 1, got 0"),
        ("num_hidden_layers", "6", "num_hidden_layers must be a whole number of at least 1"),
        ("num_attention_heads", 0, "num_attention_heads must be a whole number of at least 1"),
        ("hidden_size", "24", "hidden_size must be a whole number of at least 1, got '24'"),
        ("vocab_size", 2.5, "vocab_size must be a whole number"),
        (
            "num_attention_heads",
            7,
            "num_attention_heads must divide hidden_size: got 7 and 24. Or pass head_dim",
        ),
        ("num_key_value_heads", 2, "num_key_value_heads must divide num_attention_heads: got 2"),
        ("num_attention_heads", 8, "must be even, got 3 (hidden_size 24, num_attention_heads 8)"),
        ("head_dim", 5, "must be even, got 5"),
        ("head_dim", 0, "head_dim must be a whole number of at least 1, got 0"),
        ("hidden_dropout_prob", 1.0, "hidden_dropout_prob must be at least 0 and below 1"),
        ("layer_norm_eps", "1e-5", "layer_norm_eps must be a number, got '1e-5'. In YAML write"),
        ("kernel_epsilon", -1.0, "kernel_epsilon must be at least 0"),
        ("initializer_range", float("nan"), "initializer_range must be at least 0"),
        pytest.param("initializer_range", 10**400, "and below inf, got 1000", id="beyond floats"),
        ("rope_theta", 0.5, "rope_theta must be at least 1"),
        ("seed", 0.5, "seed must be a whole number, got 0.5"),
        ("is_decoder", "yes", "is_decoder must be true or false, got 'yes'"),
        ("pad_token_id", 31, "pad_token_id must be None or a token of the vocabulary, 0 to 30"),
        ("eos_token_id", [1, -1], "eos_token_id must be None or a token of the vocabulary"),
        ("window_size", 0, "window_size must be a whole number of at least 1"),
        ("window_size", 4, "it needs attention in ['performer-hyperbolic', 'performer-pos"),
    ],
)
def test_a_wrong_value_is_named_with_what_must_hold(tiny_config, field, value, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        tiny_config(**{field: value})
    assert words in str(caught.value)


def test_sinusoidal_positions_need_an_even_width(tiny_config):
    with pytest.raises(ValueError, match="hidden_size must be even, got 33"):
        tiny_config(position="sinusoidal", hidden_size=33)


def test_softmax_features_need_projections(tiny_config):
    with pytest.raises(ValueError, match="need random projections: projection is None"):
        tiny_config(attention="performer-positive", projection=None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_layers", "num_hidden_layers"),
        ("num_attention_head", "num_attention_heads"),
        ("atention", "attention"),
        ("hidden_dropout", "hidden_dropout_prob"),
        ("num_projection", "num_projections"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_one_meant(name, meant):
    with pytest.raises(ValueError, match=f"no field '{name}'. Did you mean '{meant}'"):
        PerformerConfig(**{name: 1})


@pytest.mark.parametrize(
    "name",
    [
        "auto_map",
        "finetuning_task",
        "mask_token_id",
        "name_or_path",
        "num_labels",
        "quantization_config",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
    ],
)
def test_what_other_tools_write_into_a_config_is_no_misspelling(name):
    PerformerConfig(**{name: 3 if name == "num_labels" else None})


def test_a_config_broken_after_it_was_made_is_refused_by_the_model(tiny_config):
    config = tiny_config()
    config.attention = "softmax"
    with pytest.raises(ValueError, match="unknown attention 'softmax'"):
        PerformerForMaskedLM(config)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match=r"unknown size 'proteins'.*Did you mean 'protein'"):
        PerformerConfig.named("proteins")


def test_sharp_attention_is_bidirectional_and_estimates_softmax():
    with pytest.raises(ValueError, match="'performer-sharp' cannot be causal"):
        PerformerConfig(attention="performer-sharp", is_decoder=True)
    with pytest.raises(ValueError, match="cannot be causal"):
        PerformerForCausalLM(PerformerConfig(attention="performer-sharp"))
    with pytest.raises(ValueError, match="cannot be causal"):
        PerformerCache(PerformerConfig(attention="performer-sharp"))
    with pytest.raises(ValueError, match="need distribution='gaussian', got 'sphere'"):
        PerformerConfig(attention="performer-sharp", distribution="sphere")
    with pytest.raises(ValueError, match="'sharp' need random projections"):
        PerformerConfig(attention="performer-sharp", projection=None)


@pytest.mark.parametrize(
    ("old", "attention"),
    [
        ({"attention": "performer-softmax"}, "performer-positive"),
        ({"attention": "performer-softmax", "estimator": "hyperbolic"}, "performer-hyperbolic"),
        ({"attention": "performer-tanh", "estimator": "hyperbolic"}, "performer-tanh"),
        ({"estimator": "positive"}, "performer-relu"),
    ],
)
def test_a_saved_config_in_old_words_loads_with_a_warning(tiny_config, tmp_path, old, attention):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    with pytest.warns(FutureWarning, match=f"this is attention='{attention}'"):
        config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() == tiny_config(attention=attention).to_dict() | {
        "_name_or_path": config._name_or_path
    }


@pytest.mark.parametrize("features", FEATURES)
def test_models_and_conversions_mean_the_same_features_by_a_word(features):
    statistics = "call" if features == "sharp" else None  # models learn from each call
    options = FavorOptions(17, features, window_size=0, statistics=statistics)
    config = PerformerConfig(attention=f"performer-{features}", num_projections=17)
    of_model = MECHANISMS[config.attention].build(config, 5).feature_map
    of_conversion = options.feature_map(config.head_dim, config.num_attention_heads, layer=5)
    assert repr(of_model) == repr(of_conversion)
    assert torch.equal(of_model.omega, of_conversion.omega)


class LaterHalf(Identity):
    """A toy without a causal form: the values, from last to first."""

    def forward(self, query, key, value, **masks):
        return super().forward(query, key, value.flip(2))


def test_a_mechanism_of_one_row_without_memory_is_refused_where_it_would_be_causal(
    tiny_config, tokens, monkeypatch
):
    monkeypatch.setitem(MECHANISMS, "toy", Mechanism(lambda config, layer: LaterHalf()))
    assert PerformerForMaskedLM(tiny_config(attention="toy"))(tokens).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"'toy' cannot be causal.*choose one of \[.*'exact',"):
        tiny_config(attention="toy", is_decoder=True)
    with pytest.raises(ValueError, match="'toy' cannot be causal"):
        PerformerForCausalLM(tiny_config(attention="toy"))
    with pytest.raises(ValueError, match=r"window_size .*, got attention='toy'"):
        tiny_config(attention="toy", window_size=3)


def test_a_mechanism_refuses_what_it_cannot_be_built_from(tiny_config, monkeypatch):
    def check(config):
        if config.num_projections > 7:
            raise ValueError("num_projections must be at most 7")

    monkeypatch.setitem(MECHANISMS, "toy", Mechanism(lambda config, layer: LaterHalf(), check))
    tiny_config(attention="toy", num_projections=7)
    with pytest.raises(ValueError, match="at most 7"):
        tiny_config(attention="toy", num_projections=8)


@dataclass(frozen=True)
class Turns:
    """The options of a toy."""

    count: int = 1
    places: int = 2

    def __post_init__(self):
        check_count("count", self.count)


@pytest.fixture
def turning(monkeypatch):
    """A toy with options: the values, moved in turns."""

    class Turned(Identity):
        def __init__(self, options):
            super().__init__()
            self.options = options

        def forward(self, query, key, value, **masks):
            return super().forward(
                query, key, value.roll(self.options.count * self.options.places, dims=2)
            )

    row = Mechanism(lambda config, layer: Turned(own_options(config)), options=Turns)
    monkeypatch.setitem(MECHANISMS, "turned", row)


@pytest.mark.usefixtures("turning")
def test_options_reach_the_mechanism_that_has_them_and_are_saved(tiny_model, tokens, tmp_path):
    options = {"count": 3}
    model = tiny_model(PerformerForMaskedLM, attention="turned", attention_options=options)
    turned = model.performer.layers[1].attention.mechanism
    assert turned.options == Turns(count=3, places=2)
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert again.config.attention_options == options
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.usefixtures("turning")
@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        (
            "turned",
            {"cuont": 1},
            "'cuont': choose one of ['count', 'places']. Did you mean 'count'",
        ),
        ("turned", {"count": 0}, "count must be a whole number of at least 1, got 0"),
        ("turned", ["count"], "must be a mapping of options to values, got ['count']"),
        ("exact", {"count": 1}, "attention='exact' has no options, got attention_options={'count'"),
    ],
)
def test_an_option_that_a_mechanism_does_not_have_is_refused(
    tiny_config, attention, options, words
):
    with pytest.raises((ValueError, TypeError)) as caught:
        tiny_config(attention=attention, attention_options=options)
    assert words in str(caught.value)


def test_heads_of_another_dim_attend_as_the_equation_says(tiny_model):
    """softmax(QKᵀ/√head_dim)V between projections of heads · head_dim, key heads shared."""
    model = tiny_model(PerformerForCausalLM, attention="exact", head_dim=10, num_key_value_heads=1)
    layer, hidden = model.performer.layers[0].attention, torch.randn(2, 11, 24)
    query, key, value = (
        project(hidden).unflatten(-1, (-1, 10)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    assert (query.shape[1], key.shape[1]) == (3, 1)
    logits = (query @ key.mT) / 10**0.5
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    out = logits.masked_fill(future, -torch.inf).softmax(-1) @ value
    expected = layer.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, None, None, None, False)[0], expected)


def test_heads_of_another_dim_remember_what_they_read(tiny_model, tokens):
    model = tiny_model(PerformerForCausalLM, head_dim=10, num_key_value_heads=1)
    cache, steps = PerformerCache(model.config), []
    for token in tokens.split(1, dim=1):
        steps.append(model(token, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens).logits, rtol=1e-4, atol=1e-4)


# Mechanisms without anything random, and those in which heads draw for themselves.
NOTHING_DRAWN = {
    "exact", "identity", "linear-transformer", "local", "sparse-transformer", "longformer"
}  # fmt: skip
BY_KEY_HEAD = {"big-bird", "linformer", "sinkhorn", "routing-transformer", "clustered-favor"}
BY_QUERY_HEAD = {"synthesizer", "reformer"}
LIMITED = {"linformer", "synthesizer", "sinkhorn"}


def built(name, layer=3, **fields):
    """The mechanism of one layer, of four heads of queries and two of keys."""
    options = {"num_projections": 5, "sharing": "none"} if name == "linformer" else None
    return MECHANISMS[name].build(
        PerformerConfig(
            **{
                **EVERY[name],
                **({"attention_options": options} if options else {}),
                "hidden_size": 16,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 13,
                **fields,
            }
        ),
        layer,
    )


def drawn(name, **fields):
    """What this mechanism has drawn, by name."""
    return {
        part: x
        for part, x in built(name, **fields).state_dict().items()
        # Counts are no draws, and sharp features have statistics besides ω.
        if not part.endswith("num_redraws") and ("sharp" not in name or part.endswith("omega"))
    }


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_a_layer_draws_is_a_function_of_the_seed_and_of_its_number(name):
    first = drawn(name, seed=5)
    assert bool(first) == (name not in NOTHING_DRAWN)
    for part, x in drawn(name, seed=5).items():
        assert torch.equal(x, first[part]), part
    for others in (drawn(name, seed=7), drawn(name, seed=5, layer=2)):
        for part, x in others.items():
            assert x.unique().numel() == 1 or not torch.equal(x, first[part]), part


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_serves_all_positions_of_its_config_and_its_shared_key_heads(name):
    mechanism = built(name)
    query, (key, value) = torch.randn(2, 4, 13, 4), torch.randn(2, 2, 2, 13, 4)
    assert mechanism(query, key, value).shape == (2, 4, 13, 4)
    if name in LIMITED:
        query, key, value = (x.repeat(1, 1, 2, 1)[:, :, :14] for x in (query, key, value))
        with pytest.raises(ValueError, match="13 positions, got 14"):
            mechanism(query, key, value)


@pytest.mark.parametrize("name", sorted(BY_KEY_HEAD | BY_QUERY_HEAD))
def test_heads_that_draw_for_themselves_differ(name):
    query, key, value = torch.randn(3, 2, 1, 13, 4).unbind()
    tensors = query.expand(-1, 4, -1, -1), *(x.expand(-1, 2, -1, -1) for x in (key, value))
    out = built(name)(*tensors)
    assert not torch.equal(out[:, 0], out[:, 2])
    assert torch.equal(out[:, 0], out[:, 1]) == (name in BY_KEY_HEAD)
