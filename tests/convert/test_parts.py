"""What is named is converted and nothing else: parts of models, models of one configuration."""

import copy
import json

import pytest
import torch
from tiny_models import LENGTH, WORDS, bart, bert, inputs_for, llama, outputs_of
from transformers import (
    BartForConditionalGeneration,
    BertModel,
    WhisperConfig,
    WhisperModel,
)

from performers import FavorOptions, calibrate, linearize, load_linearized, restore
from performers.convert import converted_layers

SMALL = {"num_projections": 17, "window_size": 0, "seed": 3}
PARTS = {"layers": {"encoder": None}}


def bart_with_head():
    return BartForConditionalGeneration(bart().config).eval()


def whisper():
    sizes = {"d_model": 32, "init_std": 0.3, "num_mel_bins": 7, "max_source_positions": LENGTH}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_ffn_dim": 48, f"{side}_attention_heads": 4}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    return WhisperModel(WhisperConfig(vocab_size=WORDS, **sizes, **ids)).eval()


def given_to(model):
    if model.main_input_name == "input_features":
        frames = torch.randn(2, 7, 2 * LENGTH)
        return {"input_features": frames, "decoder_input_ids": torch.randint(5, WORDS, (2, 11))}
    return inputs_for(model)


def body(model):
    return getattr(model, "model", model)


@pytest.mark.parametrize("build", [bart, bart_with_head, whisper])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_converting_an_encoder_leaves_every_module_of_the_decoder_bit_identical(
    build, by_name, implementation
):
    model = build()
    model.set_attn_implementation(implementation)
    inputs = given_to(model)
    states = torch.randn(2, LENGTH, 32)

    def decoder_outputs():
        found = {}
        decoder = body(model).decoder
        handles = [
            module.register_forward_hook(
                lambda _, given, out, name=name: found.update(
                    {name: (out if isinstance(out, torch.Tensor) else out[0]).clone()}
                )
            )
            for name, module in decoder.named_modules()
        ]
        keys = ("decoder_input_ids", "decoder_attention_mask", "attention_mask")
        model(encoder_outputs=(states,), **{key: inputs[key] for key in keys if key in inputs})
        for handle in handles:
            handle.remove()
        return found

    encoder = body(model).encoder
    before, exact = decoder_outputs(), encoder(inputs[model.main_input_name])[0]
    assert len(before) > 20
    if by_name:
        linearize(model, FavorOptions(**SMALL, **PARTS))
    else:
        linearize(encoder, FavorOptions(**SMALL))
    after = decoder_outputs()
    assert after.keys() == before.keys()
    for name, out in before.items():
        assert torch.equal(after[name], out), name
    assert not torch.allclose(encoder(inputs[model.main_input_name])[0], exact, atol=1e-3)
    assert body(model).decoder.config._attn_implementation == implementation
    names = converted_layers(model)
    assert len(names) == 2
    assert all("encoder.layers" in name for name in names)
    restore(model)
    assert torch.equal(encoder(inputs[model.main_input_name])[0], exact)
    assert encoder.config is body(model).decoder.config is model.config


def test_a_model_made_from_the_same_configuration_stays_exact():
    model = bert()
    twin = BertModel(model.config).eval()
    inputs = inputs_for(model)
    expected = outputs_of(twin, inputs)
    linearize(model, FavorOptions(**SMALL))
    assert torch.equal(outputs_of(twin, inputs), expected)
    assert not hasattr(twin.config, "favor")
    model.config.use_cache = False  # what is changed meanwhile is not lost
    assert restore(model).config is twin.config
    assert twin.config.use_cache is False


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ({"encoder": None}, ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]),
        (
            {"encoder": [1], "decoder": [0]},
            [
                "encoder.layers.1.self_attn",
                "decoder.layers.0.self_attn",
                "decoder.layers.0.encoder_attn",
            ],
        ),
        ({"decoder.layers.1.self_attn": None}, ["decoder.layers.1.self_attn"]),
    ],
)
def test_parts_are_saved_by_name_and_come_back(layers, expected, tmp_path):
    model = bart_with_head()
    inputs = inputs_for(model)
    options = FavorOptions(17, window_size=3, num_sinks=0, layers=layers)
    linearize(model, options)
    assert set(converted_layers(model)) == {f"model.{name}" for name in expected}
    calibrate(model, [inputs])
    out = outputs_of(model, inputs)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["favor"]["options"]
    assert FavorOptions.from_dict(written) == options
    loaded = load_linearized(BartForConditionalGeneration, tmp_path).eval()
    assert torch.equal(outputs_of(loaded, inputs), out)
    assert set(converted_layers(loaded)) == set(converted_layers(model))
    assert torch.equal(outputs_of(copy.deepcopy(model), inputs), out)


def test_generation_keeps_states_where_the_decoder_was_named_and_keys_elsewhere():
    model = bart_with_head()
    given = {
        "input_ids": torch.randint(5, WORDS, (2, 13)),
        "max_new_tokens": 5,
        "min_new_tokens": 5,
    }
    for layers in ({"encoder": None}, {"decoder": [1]}, {"decoder": None, "encoder": [0]}):
        linearize(model, FavorOptions(**SMALL, layers=layers))
        found = model.generate(**given, return_dict_in_generate=True)
        assert torch.equal(found.sequences, model.generate(**given, use_cache=False))
        kinds = [type(x).__name__ for x in found.past_key_values.self_attention_cache.layers]
        numbers = layers.get("decoder", [])
        numbers = [0, 1] if numbers is None else numbers
        assert [kind == "FavorMemory" for kind in kinds] == [n in numbers for n in (0, 1)]


@pytest.mark.usefixtures("without_shape_checks")
def test_a_bare_load_of_a_model_converted_in_parts_is_refused(tmp_path):
    linearize(bart(), FavorOptions(**SMALL, **PARTS)).save_pretrained(tmp_path)
    bare = type(bart()).from_pretrained(tmp_path, attn_implementation="favor")
    with pytest.raises(ValueError, match=r"use performers\.load_linearized"):
        bare(**inputs_for(bare))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"encodr": None}, r"BartModel has no part 'encodr' that attends: .* decoder\.layers\.0\."),
        ({"encoder": [0, 7]}, r"encoder of BartModel has no layer 7: its layers are 0 to 1\."),
        ({}, "leaves no layer of BartModel to convert"),
        ({"encoder": [-1]}, r"such as \{'encoder': None, 'decoder': \[0, 2\]\}"),
        ({3: [0]}, "by the names of parts"),
        (3, "numbers of layers, counted from 0"),
    ],
)
def test_parts_that_are_not_there_are_refused_by_name(layers, words):
    model = bart()
    with pytest.raises(ValueError, match=words):
        linearize(model, FavorOptions(layers=layers))
    assert model.config._attn_implementation == "sdpa"


def test_a_part_of_a_converted_model_can_be_converted_otherwise_but_not_saved_as_one(tmp_path):
    model = linearize(bart(), FavorOptions(**SMALL))
    inputs = inputs_for(model)
    exact_decoder = FavorOptions(window_size=5, num_projections=19)
    decoders = {name: x for name, x in converted_layers(model).items() if "decoder" in name}
    linearize(model.encoder, exact_decoder)
    found = converted_layers(model)
    assert {name: found[name] for name in decoders} == decoders
    assert found["encoder.layers.0.self_attn"].options == exact_decoder
    outputs_of(model, inputs)
    with pytest.raises(ValueError, match="was converted or restored by itself since"):
        model.save_pretrained(tmp_path)
    assert not any("favor" in name for name, _ in restore(model).named_modules())


def test_layers_by_the_name_of_the_one_part_there_is_are_layers_by_number():
    model = llama()
    inputs = inputs_for(model)
    expected = outputs_of(linearize(model, FavorOptions(**SMALL, layers=[1])), inputs)
    linearize(model, FavorOptions(**SMALL, layers={"layers": [1]}))
    assert torch.equal(outputs_of(model, inputs), expected)
    assert list(converted_layers(model)) == ["model.layers.1.self_attn"]
