"""The models' forward and backward passes: against foreign oracles, and laws that hold for all."""

import math

import pytest
import torch
from mechanisms import CAUSAL_KINDS, KINDS, is_average, unread
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from performers.baselines import Identity
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerModel,
)
from performers.models.positions import POSITIONS

both_heads = pytest.mark.parametrize("model_class", [PerformerForMaskedLM, PerformerForCausalLM])
every_mechanism = pytest.mark.parametrize("mechanism", KINDS.values(), ids=KINDS)
every_causal_mechanism = pytest.mark.parametrize(
    "mechanism", CAUSAL_KINDS.values(), ids=CAUSAL_KINDS
)
MODELS = [
    pytest.param(model_class, options, id=f"{model_class.__name__}-{name}")
    for model_class, kinds in (
        (PerformerForMaskedLM, KINDS),
        (PerformerForCausalLM, CAUSAL_KINDS),
    )
    for name, options in kinds.items()
]
every_model = pytest.mark.parametrize(("model_class", "mechanism"), MODELS)


def torch_encoder(model: PerformerModel) -> nn.TransformerEncoder:
    """torch's own pre-norm Transformer with the weights of an exact model."""
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=True,
    )
    encoder = nn.TransformerEncoder(
        layer,
        config.num_hidden_layers,
        norm=nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        enable_nested_tensor=False,
    )
    for theirs, ours in zip(encoder.layers, model.layers, strict=True):
        attention = ours.attention
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        theirs.self_attn.in_proj_weight.data = torch.cat([p.weight for p in projections])
        theirs.self_attn.in_proj_bias.data = torch.cat([p.bias for p in projections])
        theirs.self_attn.out_proj.load_state_dict(attention.out_proj.state_dict())
        theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
        theirs.norm2.load_state_dict(ours.mlp_norm.state_dict())
        theirs.linear1.load_state_dict(ours.mlp.up_proj.state_dict())
        theirs.linear2.load_state_dict(ours.mlp.down_proj.state_dict())
    encoder.norm.load_state_dict(model.norm.state_dict())
    return encoder.eval()


@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_exact_attention_is_the_transformer_encoder_of_torch(
    tiny_model, tokens, is_decoder, activation
):
    model = tiny_model(
        PerformerModel,
        attention="exact",
        position="learned",
        hidden_act=activation,
        layer_norm_eps=0.1,
        is_decoder=is_decoder,
    )
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    attention_mask = torch.ones_like(tokens)
    attention_mask[1, 7:] = 0
    embedded = model.embed_tokens(tokens) + model.positions.embedding.weight[: tokens.shape[1]]
    expected = torch_encoder(model)(
        embedded,
        mask=nn.Transformer.generate_square_subsequent_mask(11) if is_decoder else None,
        src_key_padding_mask=torch.where(attention_mask.bool(), 0.0, -torch.inf),
        is_causal=is_decoder,
    )
    out = model(tokens, attention_mask=attention_mask).last_hidden_state
    real = attention_mask.bool()
    torch.testing.assert_close(out[real], expected[real])


def test_many_features_approach_exact_attention(tiny_model, tokens):
    def logits(attention, **options):
        options |= {"attention": attention, "initializer_range": 0.1}
        return tiny_model(PerformerForMaskedLM, **options)(tokens).logits

    exact = logits("exact")
    few, many = (
        (logits("performer-positive", num_projections=count) - exact).norm() / exact.norm()
        for count in (8, 2048)
    )
    assert many < 0.06
    assert many < few / 4


def test_rotary_positions_are_those_of_llama(tiny_config):
    config = tiny_config(rope_theta=500.0)
    position_ids = torch.tensor([[0, 1, 5, 5000]])
    llama = LlamaConfig(
        hidden_size=24,
        num_attention_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    query, key = torch.randn(2, 1, 3, 4, 8).unbind()
    cos, sin = LlamaRotaryEmbedding(llama)(query, position_ids)
    rotation = POSITIONS["rotary"](config).rotation(position_ids)
    turned = rotation.turn(query), rotation.turn(key)
    torch.testing.assert_close(turned, apply_rotary_pos_emb(query, key, cos, sin))


def test_a_rotary_model_sees_the_order_of_tokens_but_not_where_they_start(tiny_model, tokens):
    # Exact attention only: ω does not turn, so one draw of features can tell where a text starts.
    model = tiny_model(PerformerForMaskedLM, attention="exact")
    here = torch.arange(11)[None]
    logits = model(tokens).logits
    assert torch.equal(model(tokens, position_ids=here).logits, logits)
    moved = model(tokens, position_ids=here + 37).logits
    torch.testing.assert_close(moved, logits, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(model(tokens, position_ids=here.flip(1)).logits, logits, rtol=0.01)


def test_sinusoidal_positions_are_those_of_vaswani(tiny_config):
    positions = POSITIONS["sinusoidal"](tiny_config())
    position_ids = torch.tensor([[0, 3, 17, 1021]])
    waves = positions.add_to(torch.zeros(1, 4, 24), position_ids)[0]
    embeddings = torch.randn(1, 4, 24)
    torch.testing.assert_close(
        positions.add_to(embeddings, position_ids), math.sqrt(24) * embeddings + waves
    )
    for row, position in enumerate((0, 3, 17, 1021)):
        for i in range(12):
            angle = position / 10000 ** (2 * i / 24)
            assert waves[row, i].item() == pytest.approx(math.sin(angle), abs=1e-4)
            assert waves[row, 12 + i].item() == pytest.approx(math.cos(angle), abs=1e-4)


def test_identity_attention_returns_the_values():
    query = torch.randn(2, 6, 5, 3)
    key, value = torch.randn(2, 2, 2, 5, 3).unbind()
    grouped = Identity()(query, key, value)
    assert torch.equal(grouped[:, 0], value[:, 0])
    assert torch.equal(grouped[:, 5], value[:, 1])
    with pytest.raises(ValueError, match="one key per query: query length is 5, key length is 4"):
        Identity()(query, key[:, :, 1:], value[:, :, 1:])


def test_in_an_identity_model_no_position_sees_another(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM, attention="identity")
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 31
    same = (model(tokens).logits == model(changed).logits).all(dim=-1)
    assert same.sum(dim=1).tolist() == [10, 10, 10]


@every_model
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_reaches_the_output(
    tiny_model, tokens, mechanism, position, side, model_class
):
    model = tiny_model(model_class, **mechanism, position=position)
    padding = torch.randint(31, (3, 6))
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(tokens)], dim=1)
    padded = torch.cat([padding, tokens], dim=1)
    if side == "right":
        padded, mask = padded.roll(11, dims=1), mask.roll(11, dims=1)
    logits = model(padded, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits, model(tokens).logits.flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(model(padded, attention_mask=mask * 0).logits).all()


@every_model
@pytest.mark.parametrize("shape", [(2, 0), (0, 5)])
def test_an_empty_batch_gives_an_empty_result(tiny_model, mechanism, model_class, shape):
    nothing = torch.zeros(shape, dtype=torch.long)
    out = tiny_model(model_class, **mechanism)(nothing, attention_mask=nothing, labels=nothing)
    assert out.logits.shape == (*shape, 31)
    assert out.loss == 0


@every_causal_mechanism
def test_later_tokens_leave_earlier_logits_bit_identical(tiny_model, tokens, mechanism):
    model = tiny_model(PerformerForCausalLM, **mechanism)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 31
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[:, 7:], after[:, 7:])


@every_model
def test_attentions_are_the_matrices_that_the_layers_apply(
    tiny_model, tokens, mechanism, model_class
):
    model = tiny_model(model_class, **mechanism)
    mask = torch.ones_like(tokens)
    mask[0, 8:] = 0
    values, outputs = [], []
    for layer in model.performer.layers:
        layer.attention.v_proj.register_forward_hook(lambda m, x, out: values.append(out))
        layer.attention.out_proj.register_forward_hook(lambda m, x, out: outputs.append(x[0]))
    matrices = model(tokens, attention_mask=mask, output_attentions=True).attentions
    for matrix, value, output in zip(matrices, values, outputs, strict=True):
        assert matrix.shape == (3, 3, 11, 11)
        if is_average(model.config):
            torch.testing.assert_close(
                matrix[mask.bool()[:, None].expand(-1, 3, -1)].sum(-1), torch.ones(3 * 30)
            )
        applied = matrix @ value.unflatten(-1, (3, 8)).transpose(1, 2)
        torch.testing.assert_close(applied.transpose(1, 2).flatten(2), output, rtol=1e-4, atol=1e-5)
        if model_class is PerformerForCausalLM:
            assert (matrix.triu(1) == 0).all()
        if mechanism["attention"] != "identity":
            assert (matrix[0, :, :, 8:] == 0).all()


def test_hidden_states_run_from_the_embeddings_to_the_final_norm(tiny_model, tokens):
    model = tiny_model(PerformerModel)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.embed_tokens(tokens))
    assert torch.equal(out.hidden_states[2], out.last_hidden_state)
    assert model(tokens).hidden_states is None
    as_tuple = model(tokens, return_dict=False)
    assert torch.equal(as_tuple[0], out.last_hidden_state)


@every_causal_mechanism
def test_gradient_checkpointing_changes_no_gradient(tiny_config, tokens, mechanism):
    gradients = []
    for is_checkpointing in (False, True):
        torch.manual_seed(3)
        model = PerformerForCausalLM(tiny_config(**mechanism, hidden_dropout_prob=0.1)).train()
        if is_checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(7)  # dropout
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    queries = "attention.q_proj.weight"
    without = unread(model.config)
    for name, expected in gradients[0].items():
        if any(projection in name for projection in without):
            assert expected is None
            continue
        assert torch.equal(gradients[1][name], expected), name
    assert "q_proj" in without or gradients[0][f"performer.layers.0.{queries}"].any()


def test_one_key_head_is_many_equal_key_heads(tiny_model, tokens):
    grouped = tiny_model(PerformerModel, num_key_value_heads=1)
    full = tiny_model(PerformerModel)
    weights = {
        name: weight.repeat(3, *[1] * (weight.ndim - 1))
        if "k_proj" in name or "v_proj" in name
        else weight
        for name, weight in grouped.state_dict().items()
    }
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens)[0], full(tokens)[0])


def test_inputs_embeds_stand_for_input_ids(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embedded)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


def test_rotary_positions_go_beyond_max_position_embeddings(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM, max_position_embeddings=5)
    assert torch.isfinite(model(tokens).logits).all()


def test_learned_positions_end_where_the_table_ends(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM, position="learned", max_position_embeddings=11)
    model(tokens)
    with pytest.raises(ValueError, match=r"end at max_position_embeddings=11, got position 11\."):
        model(torch.cat([tokens, tokens[:, :1]], dim=1))
    padded = F.pad(tokens, (4, 0))
    model(padded, attention_mask=F.pad(torch.ones_like(tokens), (4, 0)))


@pytest.mark.parametrize("position", POSITIONS)
def test_no_positions_are_within_every_limit(tiny_model, position):
    model = tiny_model(PerformerForMaskedLM, position=position, max_position_embeddings=5)
    assert model(torch.zeros(2, 0, dtype=torch.long)).logits.shape == (2, 0, 31)
    assert model(torch.zeros(2, 5, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(3, 11), "must be bool or whole numbers.*got torch.float32"),
        (torch.ones(3, 1, 11, 11, dtype=torch.long), r"= \(3, 11\).*got \(3, 1, 11, 11\)"),
        (torch.ones(3, 10, dtype=torch.long), r"= \(3, 11\).*got \(3, 10\)"),
        (torch.arange(11).expand(3, 11) // 4, "1 for a real token and 0 for padding, got 2"),
        (torch.full((3, 11), -1), "1 for a real token and 0 for padding, got -1"),
    ],
)
def test_other_masks_than_one_bit_per_token_are_refused(tiny_model, tokens, mask, words):
    with pytest.raises((ValueError, TypeError), match=words):
        tiny_model(PerformerForMaskedLM)(tokens, attention_mask=mask)


def test_a_mask_may_be_bool_or_whole_numbers(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM)
    mask = torch.rand(3, 11) < 0.7
    assert torch.equal(
        model(tokens, attention_mask=mask).logits, model(tokens, attention_mask=mask.long()).logits
    )


def test_the_loss_is_the_mean_cross_entropy_of_what_is_labeled(tiny_model, tokens):
    labels = tokens.where(torch.rand(3, 11) < 0.4, -100)
    masked = tiny_model(PerformerForMaskedLM)(tokens, labels=labels)
    chosen = labels != -100
    expected = F.cross_entropy(masked.logits[chosen], labels[chosen])
    torch.testing.assert_close(masked.loss, expected)

    causal = tiny_model(PerformerForCausalLM)(tokens, labels=labels)
    chosen = chosen[:, 1:]
    expected = F.cross_entropy(causal.logits[:, :-1][chosen], labels[:, 1:][chosen])
    torch.testing.assert_close(causal.loss, expected)


@both_heads
def test_losses_of_parts_sum_to_the_loss_of_the_whole(tiny_model, tokens, model_class):
    model = tiny_model(model_class)
    labels = tokens.where(torch.rand(3, 11) < 0.6, -100)
    counted = labels[:, 1:] if model_class is PerformerForCausalLM else labels
    count = (counted != -100).sum()
    parts = [
        model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), model(tokens, labels=labels).loss)


@both_heads
def test_without_labels_to_predict_the_loss_is_zero_not_nan(tiny_model, tokens, model_class):
    loss = tiny_model(model_class)(tokens, labels=torch.full_like(tokens, -100)).loss
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.usefixtures("without_shape_checks")
def test_labels_of_another_length_are_refused(tiny_model, tokens):
    with pytest.raises(ValueError, match=r"one entry per logit.*\(3, 10\), logits \(3, 11\)"):
        tiny_model(PerformerForMaskedLM)(tokens, labels=tokens[:, 1:])


def test_a_head_sets_the_direction_and_leaves_the_callers_config_alone(tiny_config):
    config = tiny_config(is_decoder=True)
    assert PerformerForMaskedLM(config).config.is_decoder is False
    assert config.is_decoder is True
    assert PerformerForCausalLM(tiny_config()).config.is_decoder is True


@pytest.mark.parametrize("is_tied", [True, False])
def test_embeddings_are_tied_as_the_config_says(tiny_model, is_tied):
    model = tiny_model(PerformerForMaskedLM, tie_word_embeddings=is_tied)
    assert (model.lm_head.weight is model.performer.embed_tokens.weight) == is_tied
    model.resize_token_embeddings(37)
    assert model(torch.tensor([[36]])).logits.shape == (1, 1, 37)
    assert (model.lm_head.weight is model.performer.embed_tokens.weight) == is_tied


@every_mechanism
def test_autocast_to_bfloat16_trains_finitely(tiny_config, tokens, mechanism):
    model = PerformerForMaskedLM(tiny_config(**mechanism)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_weights_start_with_the_spread_that_the_config_says(tiny_model):
    model = tiny_model(PerformerForMaskedLM, initializer_range=0.7, position="learned")
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert not weight.any()
        elif "norm" in name:
            assert (weight == 1).all()
        else:
            # The standard error of a standard deviation of n numbers is σ/√(2n).
            error = 4 * 0.7 / (2 * weight.numel()) ** 0.5
            assert weight.std().item() == pytest.approx(0.7, abs=error), name


def test_redrawing_gives_every_layer_a_new_omega(tiny_model):
    model = tiny_model(PerformerForMaskedLM)
    maps = [layer.attention.mechanism.feature_map for layer in model.performer.layers]
    before = [phi.omega.clone() for phi in maps]
    assert not torch.equal(before[0], before[1])
    model.redraw_features()
    for phi, old in zip(maps, before, strict=True):
        assert not torch.equal(phi.omega, old)
        assert phi.num_redraws == 1
    again = tiny_model(PerformerForMaskedLM)
    again.redraw_features()
    assert torch.equal(
        again.performer.layers[1].attention.mechanism.feature_map.omega, maps[1].omega
    )


def test_a_model_without_features_has_nothing_to_redraw(tiny_model, tokens):
    model = tiny_model(PerformerForMaskedLM, attention="exact")
    before = model(tokens).logits
    model.redraw_features()
    assert torch.equal(model(tokens).logits, before)


def test_dropout_falls_on_the_embeddings_and_on_both_sublayers(tiny_model, tokens):
    model = tiny_model(PerformerModel, hidden_dropout_prob=1 - 1e-7)
    for parameter in model.parameters():
        parameter.data += 0.1
    nothing = model.norm(torch.zeros(24)).expand(3, 11, -1)
    torch.testing.assert_close(model.train()(tokens).last_hidden_state, nothing)
    assert not torch.allclose(model.eval()(tokens).last_hidden_state, nothing, atol=0.1)


def test_every_word_about_features_reaches_the_features(tiny_config):
    def feature_maps(**options):
        layers = PerformerModel(tiny_config(**options)).layers
        return [layer.attention.mechanism.feature_map for layer in layers]

    words = {"projection": "iid", "distribution": "sphere", "num_projections": 13, "seed": 7}
    softmax = feature_maps(attention="performer-hyperbolic", **words)
    kernel = feature_maps(attention="performer-tanh", kernel_epsilon=0.5, **words)
    for maps in (softmax, kernel):
        for layer, phi in enumerate(maps):
            assert {word: getattr(phi, word) for word in words} == words
            assert phi.layer == layer
    assert [phi.estimator for phi in softmax] == ["hyperbolic"] * 2
    assert [(phi.fn, phi.epsilon) for phi in kernel] == [("tanh", 0.5)] * 2


def test_a_window_as_long_as_the_sequence_is_exact_attention(tiny_model, tokens):
    windowed = tiny_model(PerformerForMaskedLM, attention="performer-positive", window_size=11)
    exact = tiny_model(PerformerForMaskedLM, attention="exact")
    torch.testing.assert_close(windowed(tokens).logits, exact(tokens).logits, rtol=1e-3, atol=1e-3)


def test_the_default_model_is_the_one_of_the_paper():
    with torch.device("meta"):
        model = PerformerForMaskedLM(PerformerConfig())
    phi = model.performer.layers[0].attention.mechanism.feature_map
    assert (phi.fn, phi.num_projections, phi.projection, phi.epsilon) == (
        "relu",
        256,
        "orthogonal",
        1e-3,
    )


@pytest.mark.parametrize("window_size", [None, 3])
def test_sharp_attention_is_nearer_to_the_exact_model_with_the_same_weights(
    tiny_model, window_size
):
    tokens = torch.randint(5, 29, (3, 67), generator=torch.Generator().manual_seed(5))
    exact = tiny_model(PerformerForMaskedLM, attention="exact")
    errors = {}
    for attention in ("performer-positive", "performer-sharp"):
        options = {"attention": attention, "window_size": window_size, "num_projections": 64}
        model = tiny_model(PerformerForMaskedLM, **options)
        model.load_state_dict(exact.state_dict(), strict=False)
        errors[attention] = (model(tokens).logits - exact(tokens).logits).norm()
    assert errors["performer-sharp"] < 0.9 * errors["performer-positive"]
