"""Calibration sees what exact layers see, changes nothing else, and refuses what teaches little."""

import pytest
import torch
from tiny_models import MODELS, bart, bert, inputs_for, llama, outputs_of

from performers import FavorOptions, SharpFeatures, calibrate, linearize, restore
from performers.convert import capture_attention
from performers.convert.layer import FavorLayer
from performers.convert.linearize import converted_layers

SMALL = FavorOptions(num_projections=17, window_size=0)


def unpadded(model, length=13):
    inputs = inputs_for(model, length)
    return {name: x for name, x in inputs.items() if "mask" not in name}


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_learns_the_moments_of_the_exact_models_queries_and_keys(name):
    model = MODELS[name]()
    batches = [unpadded(model), unpadded(model)]
    seen = [capture_attention(model, **batch) for batch in batches]
    calibrate(linearize(model, SMALL), batches)
    layers = converted_layers(model)
    assert len(layers) == len(seen[0])
    for first, second in zip(*seen, strict=True):
        layer = layers[first.name]
        assert layer.is_calibrated
        expected = SharpFeatures(first.query.shape[-1], 17, first.key.shape[1])
        for captured in (first, second):
            expected.calibrate(captured.query, captured.key, scale=captured.scale)
        for side in ("query", "key"):
            for part in (f"{side}_mean", f"{side}_covariance", f"{side}_count"):
                found = layer.feature_map.get_buffer(part)
                torch.testing.assert_close(found, expected.get_buffer(part), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("window_size", "ratio"), [(0, 2.0), (3, 1.0)])
def test_queries_are_made_longer_where_nothing_is_scored_exactly(window_size, ratio):
    model = linearize(
        bert(), FavorOptions(num_projections=17, window_size=window_size, num_sinks=0)
    )
    calibrate(model, [inputs_for(model)])
    for layer in converted_layers(model).values():
        assert layer.feature_map.query_ratio == ratio


def test_padding_teaches_nothing():
    found = []
    for word in (7, 11):
        torch.manual_seed(0)
        model = linearize(llama(), SMALL)
        inputs = inputs_for(model)
        hidden = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, word)
        calibrate(model, [inputs])
        found.append(converted_layers(model)["model.layers.1.self_attn"].feature_map)
    for part in ("query_mean", "key_mean", "key_covariance", "key_count"):
        assert torch.equal(getattr(found[0], part), getattr(found[1], part))
    assert set(found[0].key_count.tolist()) == {21.0}


def test_calibration_sharpens_a_causal_model_on_other_inputs():
    model = llama()
    with torch.no_grad():  # off center and of unequal spread, as in pretrained models
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.5)
            layer.self_attn.k_proj.weight.mul_(2.0)
    inputs = inputs_for(model, 47)
    expected = outputs_of(model, inputs)
    linearize(model, FavorOptions(num_projections=256, window_size=0))
    before = (outputs_of(model, inputs) - expected).norm()
    torch.manual_seed(5)
    calibrate(model, [inputs_for(model, 47) for _ in range(4)])
    assert (outputs_of(model, inputs) - expected).norm() < 0.9 * before


def test_calibrating_again_starts_anew():
    model = linearize(bert(), SMALL)
    first, second = inputs_for(model), inputs_for(model)
    calibrate(model, [first])
    calibrate(model, [second])
    again = calibrate(linearize(restore(model), SMALL), [second])
    layer = converted_layers(again)["encoder.layer.0.attention.self"]
    assert set(layer.feature_map.key_count.tolist()) == {21.0}


def test_modes_and_weights_stay_as_they_were():
    model = linearize(bert(), SMALL).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    calibrate(model, [inputs_for(model)])
    # calibration replaces the feature maps, so count the model's own modules
    assert [m.training for name, m in model.named_modules() if "favor" not in name] == [
        training for training, (name, _) in zip(modes, model.named_modules(), strict=True)
        if "favor" not in name
    ]  # fmt: skip
    assert model.config._attn_implementation == "favor"
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())


def poisoned(model, inputs):
    """The model with a head that gives NaN."""
    with torch.no_grad():
        model.encoder.layer[1].attention.self.query.weight[8:16] = float("nan")
    return inputs


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (lambda model, inputs: [], "at least one batch of inputs, got none"),
        (
            lambda model, inputs: [{name: x[:, 3:6] for name, x in inputs.items()}],
            r"at least 8 positions.*encoder\.layer\.0\.attention\.self saw 6\. Give more or longer",
        ),
        (
            lambda model, inputs: [inputs, poisoned(model, inputs)],
            r"encoder\.layer\.1\.attention\.self: calibration needs finite numbers: layer 1 got "
            "NaN or infinity in the query of head 1",
        ),
    ],
)
def test_data_that_teach_nothing_are_refused_and_the_model_is_as_it_was(batches, words):
    model = linearize(bert(), SMALL)
    inputs = inputs_for(model)
    layers = {name: layer.feature_map for name, layer in converted_layers(model).items()}
    given = batches(model, inputs)
    with pytest.raises(ValueError, match=words):
        calibrate(model, given)
    assert model.config._attn_implementation == "favor"
    for name, layer in converted_layers(model).items():
        assert layer.feature_map is layers[name]
        assert not layer.is_calibrated


@pytest.mark.usefixtures("without_shape_checks")
def test_sequences_of_two_blocks_teach_nothing_of_a_far_field():
    inputs = inputs_for(bert())  # of 10 and 11 real tokens
    with pytest.raises(
        ValueError, match=r"12 positions with a window of 6.*saw has 11\. Give long"
    ):
        calibrate(linearize(bert(), FavorOptions(17, window_size=6)), [inputs])
    calibrate(linearize(bert(), FavorOptions(17, window_size=5)), [inputs])


@pytest.mark.usefixtures("without_shape_checks")
def test_batches_that_are_no_keyword_arguments_are_refused():
    with pytest.raises(TypeError, match=r"keyword arguments of the model.*got Tensor"):
        calibrate(linearize(bert(), SMALL), [torch.randint(5, 90, (2, 13))])


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "options", [None, FavorOptions(features="relu"), FavorOptions(statistics="call")]
)
def test_models_that_have_nothing_to_calibrate_are_refused(options):
    model = bert() if options is None else linearize(bert(), options)
    with pytest.raises(ValueError, match="calibration is for models converted with features='sha"):
        calibrate(model, [inputs_for(model)])


def test_the_statistics_of_calls_serve_until_calibration_does():
    model = linearize(bert(), FavorOptions(num_projections=64, window_size=0))
    inputs = inputs_for(model)
    by_call = linearize(bert(), FavorOptions(num_projections=64, window_size=0, statistics="call"))
    by_call.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(model, inputs), outputs_of(by_call, inputs))
    calibrate(model, [inputs])
    calibrated = linearize(
        bert(), FavorOptions(num_projections=64, window_size=0, statistics="calibrated")
    )
    calibrated.load_state_dict(model.state_dict())
    calibrate(calibrated, [inputs])
    assert torch.equal(outputs_of(model, inputs), outputs_of(calibrated, inputs))
    assert not torch.equal(outputs_of(model, inputs), outputs_of(by_call, inputs))


def test_causal_attention_uses_no_statistics_of_the_call():
    model = linearize(llama(), FavorOptions(num_projections=64, window_size=0))
    plain = linearize(
        llama(), FavorOptions(num_projections=64, window_size=0, statistics="calibrated")
    )
    plain.load_state_dict(model.state_dict())
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(model, inputs), outputs_of(plain, inputs))


def test_a_decoder_does_not_see_its_future_through_statistics_of_cross_attention():
    model = linearize(bart(), FavorOptions(num_projections=64, window_size=0))
    ids = inputs_for(model)["input_ids"]
    other = torch.cat([ids[:, :7], ids[:, 7:].flip(1)], dim=1)
    first, second = (
        model(input_ids=ids, decoder_input_ids=decoded).last_hidden_state
        for decoded in (ids, other)
    )
    assert torch.equal(first[:, :7], second[:, :7])
    assert not torch.equal(first[:, 7:], second[:, 7:])


@pytest.mark.usefixtures("without_shape_checks")
def test_statistics_of_the_call_are_refused_in_cross_attention():
    layer = FavorLayer(FavorOptions(statistics="call"), number=0, is_cross=True)
    query, key, value = torch.randn(3, 1, 2, 11, 8).unbind()
    with pytest.raises(ValueError, match="cross-attention would let a position see the queries of"):
        layer(query, key, value, is_causal=False, key_padding_mask=None, scale=None)
