"""The encoder-decoder: what it computes, what it remembers, and what it writes."""

import pytest
import torch
from mechanisms import EVERY
from torch import nn
from torch.nn import functional as F
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from performers.models import (
    MECHANISMS,
    PerformerConfig,
    PerformerEncoderDecoderCache,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerModel,
)
from performers.models.memory import EncodedKeys, EncodedState

# A mechanism of each memory between the two sequences, and two that differ from what is between.
KINDS = {
    "performer-positive": {"attention": "performer-positive"},
    "grouped relu": {"attention": "performer-relu", "num_key_value_heads": 1},
    "exact": {"attention": "exact"},
    "local, exact between": {**EVERY["local"], "cross_attention": "exact"},
    "window, elu between": {
        "attention": "performer-positive",
        "window_size": 3,
        "cross_attention": "linear-transformer",
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
linear = pytest.mark.parametrize("kind", [KINDS["performer-positive"]])
NEW = 5


@pytest.fixture
def model(tiny_model, kind):
    options = {"num_decoder_layers": 3, "bos_token_id": 1, "pad_token_id": 0}
    return tiny_model(PerformerForConditionalGeneration, **options | kind)


@pytest.fixture
def text():
    """Three outputs of seven tokens."""
    return torch.randint(2, 31, (3, 7), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def mask(tokens):
    """Padding of the input on the left of one row and on the right of another."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    mask[1, -3:] = 0
    return mask


def written(model, tokens, **options):
    torch.manual_seed(29)
    return model.generate(tokens, **{"max_new_tokens": NEW, "eos_token_id": None, **options})


def torch_transformer(model) -> nn.Transformer:
    """torch's own pre-norm Transformer with the weights of an exact model."""
    config, body = model.config, model.performer
    transformer = nn.Transformer(
        config.hidden_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.num_decoder_layers,
        config.intermediate_size,
        dropout=0.0,
        activation=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
        norm_first=True,
    )

    def load(theirs, ours):
        projections = (ours.q_proj, ours.k_proj, ours.v_proj)
        theirs.in_proj_weight.data = torch.cat([p.weight for p in projections])
        theirs.in_proj_bias.data = torch.cat([p.bias for p in projections])
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())

    for stack, ours in ((transformer.encoder, body.encoder), (transformer.decoder, body.decoder)):
        stack.norm.load_state_dict(ours.norm.state_dict())
        for theirs, own in zip(stack.layers, ours.layers, strict=True):
            load(theirs.self_attn, own.attention)
            norms = [own.attention_norm, own.mlp_norm]
            if hasattr(own, "cross_attention"):
                load(theirs.multihead_attn, own.cross_attention)
                norms.insert(1, own.cross_attention_norm)
            for number, norm in enumerate(norms, 1):
                getattr(theirs, f"norm{number}").load_state_dict(norm.state_dict())
            theirs.linear1.load_state_dict(own.mlp.up_proj.state_dict())
            theirs.linear2.load_state_dict(own.mlp.down_proj.state_dict())
    return transformer.eval()


def test_exact_attention_is_the_transformer_of_torch(tiny_model, tokens, text, mask):
    model = tiny_model(
        PerformerForConditionalGeneration,
        attention="exact",
        position="none",
        num_decoder_layers=3,
        layer_norm_eps=0.1,
    )
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which hides mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    embed = model.get_input_embeddings()
    hidden = torch_transformer(model)(
        embed(tokens),
        embed(text),
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(7),
        src_key_padding_mask=torch.where(mask.bool(), 0.0, -torch.inf),
        memory_key_padding_mask=torch.where(mask.bool(), 0.0, -torch.inf),
        tgt_is_causal=True,
    )
    logits = model(tokens, attention_mask=mask, decoder_input_ids=text).logits
    torch.testing.assert_close(logits, hidden @ model.lm_head.weight.T, rtol=1e-4, atol=1e-4)


def test_many_features_approach_exact_attention(tiny_model, tokens, text):
    def logits(attention, **options):
        options |= {"attention": attention, "initializer_range": 0.1}
        model = tiny_model(PerformerForConditionalGeneration, **options)
        return model(tokens, decoder_input_ids=text).logits

    exact = logits("exact")
    few, many = (
        (logits("performer-positive", num_projections=count) - exact).norm() / exact.norm()
        for count in (8, 2048)
    )
    assert many < 0.06
    assert many < few / 4


def test_the_loss_is_that_of_labels_shifted_to_the_right(tiny_model, tokens, text):
    model = tiny_model(PerformerForConditionalGeneration, bos_token_id=1, pad_token_id=0)
    labels = text.clone()
    labels[0, 5:] = -100
    inputs = torch.cat([torch.ones(3, 1, dtype=torch.long), text[:, :-1]], dim=1)
    inputs[0, 6] = 0  # in the place of −100, and seen by nothing that counts
    out = model(tokens, labels=labels)
    logits = model(tokens, decoder_input_ids=inputs).logits
    assert torch.equal(out.logits, logits)
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(out.loss, expected)
    parts = [
        model(tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=19).loss
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), out.loss)


@every_kind
def test_later_tokens_leave_earlier_logits_bit_identical(model, tokens, text):
    changed = text.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 31
    before, after = (
        model(tokens, decoder_input_ids=given, use_cache=False).logits for given in (text, changed)
    )
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


@every_kind
def test_padding_on_either_side_changes_nothing(model, tokens, text):
    logits = model(tokens, decoder_input_ids=text).logits
    for left, right in ((4, 0), (0, 3)):
        padded, padded_text = (F.pad(x, (left, right), value=7) for x in (tokens, text))
        masks = [F.pad(torch.ones_like(x), (left, right)) for x in (tokens, text)]
        out = model(
            padded,
            attention_mask=masks[0],
            decoder_input_ids=padded_text,
            decoder_attention_mask=masks[1],
        ).logits[masks[1].bool()]
        torch.testing.assert_close(out, logits.flatten(0, 1), rtol=1e-4, atol=1e-4)


@every_kind
def test_with_and_without_a_cache_beams_write_the_same(model, tokens, mask):
    model.double()  # two beams are 6e-6 apart, and float32 rounds by 2e-6
    options = {"do_sample": False, "num_beams": 3, "attention_mask": mask}
    cached = written(model, tokens, **options)
    assert torch.equal(cached, written(model, tokens, **options, use_cache=False))
    assert cached.shape[1] == 1 + NEW
    assert (cached[:, 0] == 1).all()


@linear
def test_with_and_without_a_cache_sampled_beams_write_the_same(model, tokens, mask):
    model.double()
    options = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    cached = written(model, tokens, **options)
    assert torch.equal(cached, written(model, tokens, **options, use_cache=False))
    assert len(cached) == 6


@every_kind
@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 3]])
def test_pieces_through_the_cache_give_the_logits_of_the_whole(model, tokens, text, mask, pieces):
    cache = PerformerEncoderDecoderCache(model.config)
    encoded = model.get_encoder()(tokens, attention_mask=mask)
    logits = [
        model(
            encoder_outputs=encoded,
            attention_mask=mask,
            decoder_input_ids=piece,
            past_key_values=cache,
        ).logits
        for piece in text.split(pieces, dim=1)
    ]
    whole = model(tokens, attention_mask=mask, decoder_input_ids=text, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-4)


@every_kind
def test_an_encoder_s_output_is_read_once(model, tokens):
    runs = []
    for layer in model.performer.decoder.layers:
        for project in (layer.cross_attention.k_proj, layer.cross_attention.v_proj):
            project.register_forward_pre_hook(lambda *_: runs.append(1))
    encoder = model.get_encoder()
    encoder.register_forward_pre_hook(lambda *_: runs.append("encoder"))
    written(model, tokens, do_sample=False)
    assert runs == ["encoder", *[1] * 6]


@linear
def test_the_cache_has_one_size_at_every_length(model, tokens, text):
    def size(inputs, outputs):
        cache = model(inputs, decoder_input_ids=outputs).past_key_values
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
        return sum(x.numel() for layer in layers for x in layer.state.parts().values())

    # 6 states × 3 rows × 3 heads × 17 features × (8 values, normalizer, scale)
    expected = 6 * 3 * 3 * 17 * 10
    assert size(tokens[:, :1], text[:, :1]) == expected
    assert size(tokens.repeat(1, 50), text.repeat(1, 50)) == expected


def test_the_memory_between_encoder_and_decoder_is_that_of_its_mechanism(tiny_config):
    for between, memory in (("performer-relu", EncodedState), ("exact", EncodedKeys)):
        config = tiny_config(attention="performer-positive", cross_attention=between)
        cache = PerformerEncoderDecoderCache(config)
        assert {type(layer) for layer in cache.cross_attention_cache.layers} == {memory}


@every_kind
def test_batch_rows_of_a_cache_can_be_reordered_chosen_and_repeated(model, tokens, text, mask):
    changes = {
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (1,): lambda cache: cache.batch_select_indices(torch.tensor([1])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    }
    given = {"attention_mask": mask, "decoder_input_ids": text}
    whole = model(tokens, **given, use_cache=False).logits[:, 4:]
    for rows, change in changes.items():
        chosen = list(rows)
        cache = PerformerEncoderDecoderCache(model.config)
        model(tokens, **given | {"decoder_input_ids": text[:, :4]}, past_key_values=cache)
        change(cache)
        out = model(
            tokens[chosen],
            attention_mask=mask[chosen],
            decoder_input_ids=text[chosen, 4:],
            past_key_values=cache,
        ).logits
        torch.testing.assert_close(out, whole[chosen], rtol=1e-4, atol=1e-4)


@every_kind
def test_a_reset_cache_takes_in_another_input(model, tokens, text):
    cache = PerformerEncoderDecoderCache(model.config)
    model(tokens, decoder_input_ids=text, past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    other = tokens.flip(1)[:, :5]
    again = model(other, decoder_input_ids=text, past_key_values=cache).logits
    torch.testing.assert_close(again, model(other, decoder_input_ids=text).logits)


@every_kind
def test_attentions_are_the_matrices_that_the_layers_apply(model, tokens, text, mask):
    values, outputs = [], []
    for layer in model.performer.decoder.layers:
        cross = layer.cross_attention
        cross.v_proj.register_forward_hook(lambda m, x, out: values.append(out))
        cross.out_proj.register_forward_hook(lambda m, x, out: outputs.append(x[0]))
    given = {"attention_mask": mask, "decoder_input_ids": text}
    out = model(tokens, **given, output_attentions=True)
    torch.testing.assert_close(out.logits, model(tokens, **given).logits, rtol=1e-4, atol=1e-4)
    assert [x.shape for x in out.encoder_attentions] == [(3, 3, 11, 11)] * 2
    assert [x.shape for x in out.decoder_attentions] == [(3, 3, 7, 7)] * 3
    for matrix, value, output in zip(out.cross_attentions, values, outputs, strict=False):
        assert matrix.shape == (3, 3, 7, 11)
        assert (matrix[0, :, :, :4] == 0).all()
        torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(3, 3, 7))
        value = value.unflatten(-1, (-1, 8)).transpose(1, 2)
        value = value.repeat_interleave(3 // value.shape[1], dim=1)
        applied = (matrix @ value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(applied, output, rtol=1e-4, atol=1e-5)
    for matrix in out.decoder_attentions:
        assert (matrix.triu(1) == 0).all()


@linear
def test_attentions_need_the_whole_sequence(model, tokens, text):
    cache = model(tokens, decoder_input_ids=text).past_key_values
    with pytest.raises(ValueError, match="needs the keys of the whole sequence"):
        model(tokens, decoder_input_ids=text[:, :1], past_key_values=cache, output_attentions=True)


@every_kind
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tiny_config, tokens, text, kind, is_reentrant):
    gradients = []
    for is_checkpointing in (False, True):
        torch.manual_seed(3)
        config = tiny_config(**kind, bos_token_id=1, hidden_dropout_prob=0.1)
        model = PerformerForConditionalGeneration(config).train()
        if is_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
            if is_reentrant:  # which needs an input with a gradient
                model.enable_input_require_grads()
        torch.manual_seed(7)  # dropout
        model(tokens, labels=text).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        # Checkpoints add up the gradients of the encoder's output in another order.
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)
    between = "decoder.layers.0.cross_attention.k_proj.weight"
    assert gradients[0][f"performer.{between}"].any()
    assert gradients[0]["performer.encoder.layers.0.mlp.up_proj.weight"].any()


@every_kind
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_a_reloaded_model_gives_bit_identical_output(
    tiny_model, tokens, text, tmp_path, kind, position
):
    model = tiny_model(PerformerForConditionalGeneration, **kind, position=position)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = PerformerForConditionalGeneration.from_pretrained(tmp_path)
    expected = model(tokens, decoder_input_ids=text).logits
    assert torch.equal(again(tokens, decoder_input_ids=text).logits, expected)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


def test_every_omega_is_a_draw_of_its_own(tiny_model):
    model = tiny_model(PerformerForConditionalGeneration)
    omegas = [x for name, x in model.named_buffers() if name.endswith("omega")]
    assert len(omegas) == 6
    distances = torch.cdist(*2 * [torch.stack(omegas).flatten(1)]) + torch.eye(6)
    assert (distances > 0).all()


def test_norms_after_the_sublayers_are_those_of_the_first_transformer(tiny_model, tokens, text):
    model = tiny_model(
        PerformerForConditionalGeneration, attention="exact", norm_first=False, final_norm=False
    )
    hidden = model(tokens, decoder_input_ids=text, output_hidden_states=True).decoder_hidden_states
    torch.testing.assert_close(hidden[-1].mean(dim=-1), torch.zeros(3, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[-1].var(dim=-1, correction=0), torch.ones(3, 7))


def test_embeddings_are_shared_and_resized(tiny_model, tokens, text):
    model = tiny_model(PerformerForConditionalGeneration)
    assert model.lm_head.weight is model.performer.encoder.embed_tokens.weight
    model.resize_token_embeddings(37)
    out = model(tokens, decoder_input_ids=text.fill_(36))
    assert out.logits.shape == (3, 7, 37)
    embedded = model.get_input_embeddings()(text)
    again = model(tokens, decoder_inputs_embeds=embedded)
    assert torch.equal(again.logits, out.logits)


@pytest.mark.slow
def test_the_trainer_of_transformers_learns_and_generates(tiny_model, tokens, text, tmp_path):
    options = {"bos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.1}
    model = tiny_model(PerformerForConditionalGeneration, **options)
    arguments = Seq2SeqTrainingArguments(
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=8,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": x, "labels": y} for x, y in zip(tokens, text, strict=True)]
    trainer = Seq2SeqTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    assert (trainer.predict(rows).predictions[:, 1:8] == text.numpy()).all()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_crosses_sequences_where_its_row_says_so(tiny_config, name):
    options = EVERY[name]
    mechanism = MECHANISMS[name].build(tiny_config(**options), 0)
    query, key = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 11, 8)

    def rows_are_independent():
        try:
            out = mechanism(query, key, key)
        except ValueError:
            return False
        other = query.clone()
        other[:, :, 5:] += 1
        return torch.equal(mechanism(other, key, key)[:, :, :5], out[:, :, :5])

    assert rows_are_independent() == (MECHANISMS[name].cross_memory is not None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (EVERY["local"], "choose cross_attention from .*, got 'local'"),
        ({"cross_attention": "performer-sharp"}, "one by one.*got 'performer-sharp'"),
        ({"cross_attention": "exakt"}, "Did you mean 'exact'"),
        ({**EVERY["linformer"], "cross_attention": "exact"}, "decoder of an encoder-decoder"),
        ({"attention": "performer-positive", "dialect": {}}, "no dialect"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a whole number of at least 1"),
        ({"decoder_start_token_id": 31}, "decoder_start_token_id must be None or a token"),
    ],
)
def test_what_an_encoder_decoder_cannot_be_made_of_is_refused(tiny_config, options, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**options, is_encoder_decoder=True)


@pytest.mark.usefixtures("without_shape_checks")
@linear
def test_inputs_that_do_not_fit_are_refused(model, tokens, text):
    encoded = model.get_encoder()(tokens)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    short = torch.ones_like(tokens[:, 1:])
    with pytest.raises(ValueError, match=r"input or its output, not both.*and input_ids"):
        model(tokens, encoder_outputs=encoded, decoder_input_ids=text)
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids and decoder_inputs_em"):
        model(tokens)
    with pytest.raises(TypeError, match=r"EncoderDecoderCache, got EncoderDecoderCache\. Make it"):
        model(tokens, decoder_input_ids=text, past_key_values=cache)
    with pytest.raises(ValueError, match="got cache_implementation='static'"):
        written(model, tokens, cache_implementation="static")
    with pytest.raises(ValueError, match=r"= \(3, 11\).*got \(3, 10\)"):
        model(encoder_outputs=encoded, attention_mask=short, decoder_input_ids=text)
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="give the config a decoder_start_token_id"):
        model(tokens, labels=text)


@pytest.mark.parametrize(
    "model_class", [PerformerModel, PerformerForCausalLM, PerformerForMaskedLM]
)
def test_one_stack_is_not_made_of_a_config_of_two(tiny_config, model_class):
    with pytest.raises(ValueError, match="take PerformerForConditionalGeneration"):
        model_class(PerformerConfig(**tiny_config().to_diff_dict(), is_encoder_decoder=True))
