"""`linearize` changes how a model attends and nothing else, and can be undone."""

import copy
import json

import pytest
import torch
from tiny_models import MODELS, TINY, WIDTH, WORDS, bert, gpt2, inputs_for, llama, outputs_of
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    BloomModel,
    CLIPConfig,
    CLIPModel,
    DogeConfig,
    DogeModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertModel,
    T5Config,
    T5Model,
)
from warm import warm_python

from performers import FavorOptions, SharpFeatures, calibrate, linearize, load_linearized, restore
from performers.convert.layer import FavorLayer
from performers.convert.linearize import converted_layers
from performers.diagnosis import measure_frontier
from performers.diagnosis.captured import Captured
from performers.functional import attention_matrix, softmax_attention
from performers.nn.words import FEATURES

SMALL = FavorOptions(num_projections=17, window_size=0, seed=3)


@pytest.mark.parametrize("name", MODELS)
def test_restoring_gives_the_exact_model_back(name):
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    inputs = inputs_for(model)
    expected, config = outputs_of(model, inputs), model.config.to_dict()
    linearize(model, SMALL)
    assert not torch.equal(outputs_of(model, inputs), expected)
    assert restore(model) is model
    assert torch.equal(outputs_of(model, inputs), expected)
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    assert not any("favor" in part for part, _ in model.named_modules())
    assert "save_pretrained" not in vars(model)


def test_restoring_undoes_a_bare_switch_and_leaves_an_exact_model_alone():
    model = bert()
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    assert torch.equal(outputs_of(restore(model), inputs), expected)
    model.set_attn_implementation("favor")
    outputs_of(model, inputs)
    assert torch.equal(outputs_of(restore(model), inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_weights_keep_their_names_and_values(name):
    model = MODELS[name]()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    outputs_of(linearize(model), inputs_for(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def with_positions(inputs, name):
    """Of rotary models: `linearize` counts positions where none are given, a bare switch cannot."""
    if name != "Llama":
        return inputs
    return inputs | {"position_ids": (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)}


@pytest.mark.parametrize("name", MODELS)
def test_a_bare_switch_is_linearize_with_the_defaults(name):
    bare = MODELS[name]()
    converted = linearize(copy.deepcopy(bare), FavorOptions())
    bare.set_attn_implementation("favor")
    inputs = with_positions(inputs_for(bare), name)
    assert torch.equal(outputs_of(bare, inputs), outputs_of(converted, inputs))


@pytest.mark.parametrize("options", [SMALL, FavorOptions(features="relu", projection="iid")])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_comes_back_bit_identical(name, options, tmp_path):
    model = linearize(MODELS[name](), options)
    inputs = with_positions(inputs_for(model), name)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "favor.safetensors").exists()
    for loaded in (
        load_linearized(type(model), tmp_path),
        type(model).from_pretrained(tmp_path, attn_implementation="favor"),
    ):
        assert torch.equal(outputs_of(loaded.eval(), inputs), expected)
    exact = type(model).from_pretrained(tmp_path)
    assert exact.config._attn_implementation == "sdpa"
    assert torch.equal(outputs_of(exact.eval(), inputs), outputs_of(restore(model), inputs))


def test_the_config_says_how_to_load_the_model(tmp_path):
    linearize(bert(), SMALL).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["favor"]
    assert written["options"]["num_projections"] == 17
    assert "pip install 'performers[hf]'" in written["note"]
    assert "performers.load_linearized(" in written["note"]


def test_without_the_package_the_exact_model_loads(tmp_path):
    linearize(bert(), SMALL).save_pretrained(tmp_path)
    code = (
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r})\n"
        "print(model.config._attn_implementation, 'pip install' in model.config.favor['note'])"
    )
    assert warm_python(code, blocked=["performers"]) == "sdpa True"


def test_converting_twice_changes_nothing_and_other_options_take_their_place():
    model = linearize(llama(), SMALL)
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    layers = converted_layers(model)
    assert converted_layers(linearize(model, SMALL)) == layers
    other = outputs_of(linearize(model, FavorOptions(num_projections=19, window_size=0)), inputs)
    assert not torch.equal(other, expected)
    assert model.config.favor["options"]["num_projections"] == 19
    assert torch.equal(outputs_of(linearize(model, SMALL), inputs), expected)
    restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_are_not_named_stay_exact():
    model, exact = llama(num_hidden_layers=3), llama(num_hidden_layers=3)
    exact.load_state_dict(model.state_dict())
    linearize(model, FavorOptions(window_size=0, layers=[2]))
    assert list(converted_layers(model)) == ["model.layers.2.self_attn"]
    inputs = inputs_for(model)
    states = [m(**inputs, output_hidden_states=True).hidden_states[:3] for m in (model, exact)]
    mask = inputs["attention_mask"].bool()
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs_of(model, inputs), outputs_of(exact, inputs), atol=1e-3)


@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("far", [True, False])
def test_more_sinks_than_tokens_are_exact_attention(build, far):
    model = build()
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    linearize(model, FavorOptions(17, window_size=2, num_sinks=97, far=far))
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-3, atol=1e-4)


def test_options_that_mean_the_same_are_equal():
    first = FavorOptions(layers=[2, 1, 2], exact_heads={1: [3, 0, 3], 2: []})
    second = FavorOptions(layers=(1, 2), exact_heads={1: (0, 3)})
    assert first == second == FavorOptions.from_dict(json.loads(json.dumps(first.to_dict())))
    assert hash(first) == hash(second)
    assert first != FavorOptions(layers=(1, 2))


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_a_model_with_exact_heads_comes_back(name, tmp_path):
    model = linearize(MODELS[name](), FavorOptions(17, window_size=0, exact_heads={1: [3, 0]}))
    inputs = with_positions(inputs_for(model), name)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    for loaded in (
        load_linearized(type(model), tmp_path),
        type(model).from_pretrained(tmp_path, attn_implementation="favor"),
    ):
        assert torch.equal(outputs_of(loaded.eval(), inputs), expected)
    assert not torch.equal(
        outputs_of(linearize(model, FavorOptions(17, window_size=0)), inputs), expected
    )


def test_a_model_converted_in_part_comes_back(tmp_path):
    for model in (llama(), MODELS["ViT"]()):
        linearize(model, FavorOptions(layers=(1,)))
        inputs = inputs_for(model)
        expected = outputs_of(model, inputs)
        assert len(converted_layers(model)) == 1
        model.save_pretrained(tmp_path)
        loaded = load_linearized(type(model), tmp_path).eval()
        assert torch.equal(outputs_of(loaded, inputs), expected)


@pytest.mark.usefixtures("without_shape_checks")
def test_layers_without_a_number_need_load_linearized(tmp_path):
    model = linearize(MODELS["ViT"](), FavorOptions(layers=(1,)))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="favor")
    with pytest.raises(ValueError, match=r"use performers\.load_linearized"):
        loaded(**inputs_for(model))


LOCAL = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 5}
NO_TOKENS = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
BOTH_KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma3TextModel(Gemma3TextConfig(**TINY, **WIDTH, **LOCAL, layer_types=BOTH_KINDS)),
        lambda: ModernBertModel(
            ModernBertConfig(
                **TINY, **WIDTH, **NO_TOKENS, local_attention=6, layer_types=BOTH_KINDS
            )
        ),
    ],
)
def test_window_layers_beside_layers_without_a_window_stay_exact(model, tmp_path):
    model = model().eval()
    (name,) = converted_layers(linearize(model, FavorOptions(window_size=13)))
    assert "layers.1." in name
    is_rotary = isinstance(model, Gemma3TextModel)
    inputs = with_positions(inputs_for(model), "Llama" if is_rotary else "")
    ours = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, attn_implementation="favor").eval()
    assert torch.equal(outputs_of(loaded, inputs), ours)
    # A window of the whole length makes the converted layer exact too.
    torch.testing.assert_close(ours, outputs_of(restore(model), inputs), rtol=1e-3, atol=1e-4)


def test_parts_of_a_composite_model_are_converted_and_come_back(tmp_path):
    text = TINY | WIDTH | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    vision = {k: v for k, v in (TINY | WIDTH).items() if k != "vocab_size"}
    config = CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 12, "patch_size": 4}
    )
    model = linearize(CLIPModel(config).eval(), SMALL)
    inputs = {"input_ids": torch.randint(5, 90, (2, 13)), "pixel_values": torch.randn(2, 3, 12, 12)}
    expected = model(**inputs).logits_per_image
    assert len(converted_layers(model)) == 4
    model.save_pretrained(tmp_path)
    for loaded in (
        load_linearized(AutoModel, tmp_path),
        AutoModel.from_pretrained(tmp_path, attn_implementation="favor"),
    ):
        assert torch.equal(loaded.eval()(**inputs).logits_per_image, expected)
    restore(model)
    assert model.vision_model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config.text_config, "favor")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (
            lambda: BloomModel(BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=4)),
            {},
            "BloomModel computes attention, or some of it, by itself",
        ),
        (
            lambda: T5Model(T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
            {},
            r"T5Attention \(encoder.*\) attends with a bias for each pair of positions",
        ),
        (
            lambda: DogeModel(DogeConfig(**TINY, **WIDTH, num_key_value_heads=2)),
            {"layers": (1,)},
            r"DogeAttention \(layers\.0.*\) attends with a mask of pairs of its own",
        ),
        (bert, {"layers": (0, 7)}, r"BertModel has no layer 7: its layers are 0 to 1\."),
        (bert, {"layers": (0,), "exact_heads": {1: [2]}}, "layer 1 of BertModel is none of 0"),
        (bert, {"exact_heads": {1: [4]}}, r"heads 0 to 3 of layer 1, got \(4,\)"),
        (bert, {"exact_heads": {1: range(4)}}, "To keep all exact, leave the layer out of layers"),
        (MODELS["ViT"], {"exact_heads": {1: [2]}}, "some of ViTModel do not. Choose layers="),
        (bert, {"layers": ()}, "leaves no layer of BertModel to convert"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_touched(model, options, words):
    model = model()
    before = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        linearize(model, FavorOptions(**options))
    assert (model.config.to_dict(), model.config._attn_implementation) == before


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("build", [bert, llama])
@pytest.mark.parametrize("positional", [False, True])
def test_segment_ids_are_no_mask(build, positional):
    model = linearize(build(), SMALL)
    ids = inputs_for(model)["input_ids"]
    segments = torch.arange(ids.shape[1]).expand_as(ids) // 5
    for converted in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match="1 for a real token and 0 for padding, got 2"):
            converted(*[ids, segments]) if positional else converted(ids, attention_mask=segments)
        outputs_of(restore(converted), {"input_ids": ids, "attention_mask": segments})  # its own


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"got Linear\. Of a wrapped model pass the one inside"):
        linearize(nn.Linear(3, 5))


@pytest.mark.usefixtures("without_shape_checks")
def test_loading_a_model_that_was_not_converted_is_refused(tmp_path):
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was not converted: its config has no 'favor'"):
        load_linearized(AutoModel, tmp_path)


def test_loading_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no model .*nothing: no folder with a"):
        load_linearized(AutoModel, tmp_path / "nothing")


@pytest.mark.parametrize("features", FEATURES)
def test_a_near_field_is_the_default_of_features_that_it_can_stand_beside(features):
    options = FavorOptions(features=features)
    expected = 128 if features in ("sharp", "positive", "hyperbolic") else 0
    assert options.window_size == expected
    assert bool(options.near_field()) is bool(expected)
    assert FavorOptions.from_dict(options.to_dict()) == options
    assert FavorOptions(features=features, window_size=0).near_field() == {}


def test_options_are_those_of_the_cheapest_setting_within_an_error():
    query, key, value = torch.randn(3, 2, 3, 131, 8).mul(2).unbind()
    layer = Captured("layer", query, key, value, scale=None, is_causal=False)
    frontier = measure_frontier([layer], statistics="call", num_projections=[16])
    for setting in frontier.settings:
        options = FavorOptions.within(frontier, setting.error)
        chosen = frontier.within(setting.error)
        converted = FavorLayer(options, number=0)
        converted.prepare(8, query.device, num_heads=3)
        out = converted(query, key, value, is_causal=False, key_padding_mask=None, scale=None)
        exact = softmax_attention(query, key, value)
        error = (out - exact).flatten(2).norm(dim=-1) / exact.flatten(2).norm(dim=-1)
        torch.testing.assert_close(float(error.mean()), chosen.error, rtol=1e-4, atol=0)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": "sharpe"}, "unknown features 'sharpe'.*Did you mean 'sharp'"),
        ({"num_projections": 0}, "num_projections must be a whole number of at least 1"),
        ({"projection": None}, "features 'sharp' need random projections"),
        ({"statistics": "calls"}, "unknown statistics 'calls'"),
        ({"features": "relu", "statistics": "call"}, "statistics are learned by features='sharp'"),
        ({"features": "relu", "window_size": 5}, "needs features in \\['sharp', 'positive', 'hyp"),
        ({"features": "relu", "num_sinks": 2}, "belong to an exact near field, and there is none"),
        ({"window_size": 0, "far": False}, "belong to an exact near field, and there is none"),
        ({"window_size": 0, "far_limit": 0.2}, "belong to an exact near field, and there is none"),
        ({"far_limit": -1.0}, "far_limit must be positive and finite"),
        ({"far_limit": 0.2, "far": False}, "and far=False leaves them out"),
        ({"num_heavy": 5}, "the estimate of the far keys would count them again: pass far=False"),
        ({"window_size": -1}, "window_size must be a whole number of at least 0"),
        ({"layers": [-1]}, "numbers of layers, counted from 0"),
        ({"exact_heads": {0: [1.5]}}, r"such as \{3: \[0, 5\]\}: got \{0: \[1\.5\]\}"),
        ({"features": "relu", "exact_heads": {0: [1]}}, "put softmax attention beside its estima"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FavorOptions(**options)


@pytest.mark.usefixtures("without_shape_checks")
def test_an_option_of_another_version_is_refused():
    with pytest.raises(ValueError, match="unknown option of a conversion 'temperature'"):
        FavorOptions.from_dict({"temperature": 2.0})


def test_a_copy_is_converted_by_itself(tmp_path):
    model = linearize(llama(), SMALL)
    twin = copy.deepcopy(model)
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    restore(model)
    assert torch.equal(outputs_of(twin, inputs), expected)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    twin.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(load_linearized(type(twin), tmp_path), inputs), 2 * expected)


def test_projections_stay_float32_when_the_model_does_not(tmp_path):
    linearize(llama(), SMALL).save_pretrained(tmp_path)
    model = load_linearized(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    omega = SharpFeatures(8, 17, seed=3, layer=1).omega
    for cast in (model, model.to(torch.float16).to(torch.bfloat16)):
        assert cast.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(cast.model.layers[1].self_attn.favor.feature_map.omega, omega)
    assert outputs_of(model, inputs_for(model)).dtype == torch.bfloat16


def test_redrawn_projections_are_saved(tmp_path):
    model = linearize(gpt2(), FavorOptions(17, "positive", window_size=0))
    for layer in converted_layers(model).values():
        layer.feature_map.redraw(torch.Generator().manual_seed(5))
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs_of(load_linearized(AutoModel, tmp_path).eval(), inputs), expected)


def test_activation_checkpointing_changes_no_gradient():
    model = linearize(llama(), SMALL).train()
    inputs = inputs_for(model)
    gradients = []
    for _ in range(2):
        outputs_of(model, inputs).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        model.zero_grad()
        model.activation_checkpointing_enable()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("statistics", [None, "calibrated"])
@pytest.mark.parametrize("window_size", [0, 3])
def test_attention_matrix_reads_a_converted_layer(statistics, window_size):
    model = linearize(
        bert(), FavorOptions(statistics=statistics, window_size=window_size, num_sinks=0)
    )
    given = {}
    layer = converted_layers(model)["encoder.layer.1.attention.self"]
    layer.register_forward_pre_hook(
        lambda _, args, options: given.update(qkv=args, **options), with_kwargs=True
    )
    weights = model(**inputs_for(model), output_attentions=True).attentions[1]
    query, key, _ = given["qkv"]
    matrix = attention_matrix(
        query, key, layer.feature_map, key_padding_mask=given["key_padding_mask"],
        scale=given["scale"], window_size=window_size or None,
    )  # fmt: skip
    torch.testing.assert_close(matrix, weights)


COMPILED = """
import torch
from transformers import BertConfig, BertModel
from performers import FavorOptions, linearize

torch.manual_seed(3)
config = BertConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
    intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
model = linearize(BertModel(config), FavorOptions(17, statistics={statistics!r}, window_size=0))
inputs = {{"input_ids": torch.randint(97, (2, 13)), "attention_mask": torch.ones(2, 13)}}
inputs["attention_mask"][0, :3] = 0
compiled = torch.compile(model, fullgraph=True)(**inputs).last_hidden_state
compiled.sum().backward()
weight = model.encoder.layer[0].attention.self.key.weight
gradient, weight.grad = weight.grad, None
expected = model(**inputs).last_hidden_state
expected.sum().backward()
torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("statistics", [None, "calibrated"])
def test_a_bidirectional_model_compiles_as_one_graph(fresh_python, statistics):
    fresh_python(COMPILED.format(statistics=statistics))


def test_calibration_is_saved_and_only_load_linearized_brings_it_back(tmp_path):
    model = linearize(llama(), SMALL)
    inputs = inputs_for(model)
    calibrate(model, [inputs])
    expected = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = load_linearized(AutoModelForCausalLM, tmp_path).eval()
    assert torch.equal(outputs_of(loaded, inputs), expected)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="favor")
    with pytest.raises(ValueError, match=r"use performers\.load_linearized"):
        bare(**inputs)
    # The model without its head finds its layers too.
    body = load_linearized(AutoModel, tmp_path).eval()
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    mask = inputs["attention_mask"].bool()
    assert torch.equal(body(**inputs).last_hidden_state[mask], states[mask])
