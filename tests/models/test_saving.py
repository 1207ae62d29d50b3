"""save_pretrained and from_pretrained: a reloaded model is the same model, ω included."""

import pytest
import torch
from mechanisms import EVERY
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
)

OMEGA = "performer.layers.{}.attention.mechanism.feature_map.omega"


def omegas(model) -> list[torch.Tensor]:
    return [value for name, value in model.state_dict().items() if name.endswith(".omega")]


@pytest.mark.parametrize("mechanism", EVERY.values(), ids=EVERY)
def test_a_reloaded_model_gives_bit_identical_output(tiny_model, tokens, tmp_path, mechanism):
    model = tiny_model(PerformerForMaskedLM, **mechanism)
    for parameter in model.parameters():  # away from what a new model would draw again
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    torch.manual_seed(11)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert not again.training
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("position", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_positions_and_untied_heads_are_reloaded_too(
    tiny_model, tokens, tmp_path, position, is_tied
):
    model = tiny_model(PerformerForCausalLM, position=position, tie_word_embeddings=is_tied)
    model.save_pretrained(tmp_path)
    again = PerformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_the_omega_that_was_redrawn_is_the_one_that_is_saved(tiny_model, tokens, tmp_path):
    model = tiny_model(PerformerForMaskedLM)
    before = model(tokens).logits
    model.redraw_features()
    model.redraw_features(torch.Generator().manual_seed(13))
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert not torch.equal(again(tokens).logits, before)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    again.redraw_features()  # the count goes on where it stood
    assert again.performer.layers[1].attention.mechanism.feature_map.num_redraws == 3


def test_a_checkpoint_is_safetensors_with_omega_in_float32(tiny_model, tmp_path):
    model = tiny_model(PerformerForMaskedLM).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["performer.embed_tokens.weight"].dtype == torch.bfloat16
    for layer in range(2):
        assert saved[OMEGA.format(layer)].dtype == torch.float32
        assert torch.equal(saved[OMEGA.format(layer)], omegas(model)[layer])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_omega_stays_float32_and_bit_identical_in_half_precision(
    tiny_model, tokens, tmp_path, dtype
):
    model = tiny_model(PerformerForMaskedLM, attention="performer-positive")
    model.redraw_features()
    expected = omegas(model)
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path, dtype=dtype)
    cast = PerformerForMaskedLM.from_pretrained(tmp_path).to(dtype)
    for half in (loaded, cast):
        assert half.lm_head.weight.dtype == dtype
        for omega, original in zip(omegas(half), expected, strict=True):
            assert omega.dtype == torch.float32
            assert torch.equal(omega, original)
        logits = half(tokens).logits
        assert logits.dtype == dtype
        assert (logits.float() - model(tokens).logits).norm() < 0.1 * logits.float().norm()
    assert torch.equal(loaded(tokens).logits, cast(tokens).logits)


def test_an_omega_that_a_checkpoint_lacks_is_drawn_from_the_seed(tiny_model, tokens, tmp_path):
    model = tiny_model(PerformerForMaskedLM, seed=17)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[OMEGA.format(1)]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(omegas(again)[1], omegas(model)[1])
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_building_on_the_meta_device_draws_the_same_omega(tiny_config):
    with torch.device("meta"):
        model = PerformerModel(tiny_config())
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = omegas(PerformerModel(tiny_config()))
    assert all(map(torch.equal, omegas(model), expected))


def test_a_masked_model_opens_as_a_causal_one_and_without_its_head(tiny_model, tmp_path):
    model = tiny_model(PerformerForMaskedLM)
    model.save_pretrained(tmp_path)
    causal, report = PerformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert causal.config.is_decoder is True
    assert torch.equal(causal.lm_head.weight, model.lm_head.weight)
    body, report = PerformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(body.norm.weight, model.performer.norm.weight)


@pytest.mark.parametrize(
    ("auto_class", "model_class"),
    [
        (AutoModel, PerformerModel),
        (AutoModelForMaskedLM, PerformerForMaskedLM),
        (AutoModelForCausalLM, PerformerForCausalLM),
        (AutoModelForSeq2SeqLM, PerformerForConditionalGeneration),
        (AutoModelForSequenceClassification, PerformerForSequenceClassification),
        (AutoModelForTokenClassification, PerformerForTokenClassification),
    ],
)
def test_auto_classes_know_performers(tiny_model, tmp_path, auto_class, model_class):
    tiny_model(model_class).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PerformerConfig
    assert type(auto_class.from_pretrained(tmp_path)) is model_class


def test_one_seed_gives_one_omega_and_another_seed_another(tiny_config):
    first, same, other = (
        omegas(PerformerModel(tiny_config(seed=seed, initializer_range=0.01 * seed + 0.1)))
        for seed in (19, 19, 23)
    )
    assert torch.equal(first[0], same[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("mechanism", EVERY.values(), ids=EVERY)
def test_heads_of_another_dim_are_saved_and_loaded(tiny_model, tokens, tmp_path, mechanism):
    model = tiny_model(PerformerForMaskedLM, **mechanism, head_dim=10)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    for name, shape in (("q_proj", (30, 24)), ("k_proj", (30, 24)), ("out_proj", (24, 30))):
        assert shapes[f"performer.layers.1.attention.{name}.weight"] == shape
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert again.config.head_dim == 10
    assert torch.equal(again(tokens).logits, model(tokens).logits)
