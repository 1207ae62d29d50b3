"""`attn_implementation="favor"`: the right arguments arrive, and what cannot be served is refused.

A random feature estimate is right only on average. So most tests put exact attention in the place
of the estimate: then a switched model must be the model that it was, and everything is tested but
the features.
"""

import re

import pytest
import torch
from tiny_models import MODELS, TINY, WIDTH, WORDS, bart, bert, gpt2, inputs_for, llama, outputs_of
from transformers import (
    Aimv2TextConfig,
    Aimv2TextModel,
    AutoModel,
    BigBirdPegasusConfig,
    BigBirdPegasusModel,
    BloomConfig,
    BloomModel,
    CLIPTextConfig,
    CLIPTextModel,
    DynamicCache,
    EsmConfig,
    EsmModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    GPTBigCodeConfig,
    GPTBigCodeModel,
    GptOssConfig,
    GptOssModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    MllamaTextConfig,
    MllamaTextModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    WhisperConfig,
    WhisperModel,
)
from warm import warm_python

import performers
from performers.convert import FavorOptions, layer
from performers.convert.plain_attention import OTHER_ATTENTION
from performers.convert.sites import Sites, is_cross_attention
from performers.functional import softmax_attention
from performers.models.naming import CACHE


@pytest.fixture
def exact_estimates(monkeypatch):
    """Attention of converted layers without its error: exact, with what it was called with."""
    calls = []

    def attend(query, key, value, phi, **options):
        calls.append(options | {"query": query, "key": key, "phi": phi})
        for word in ("window_size", "num_sinks", "far", "far_limit", "num_heavy"):
            options.pop(word, None)
        return softmax_attention(query, key, value, **options)

    monkeypatch.setattr(layer.FavorLayer, "attend", staticmethod(attend))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_masks_scales_heads_and_causality_arrive_as_exact_attention_gets_them(
    name, exact_estimates
):
    model = MODELS[name]()
    inputs = inputs_for(model)
    model.set_attn_implementation("eager")
    expected = outputs_of(model, inputs)
    model.set_attn_implementation("favor")
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(exact_estimates) == (6 if name == "BART" else 2)


@pytest.mark.parametrize(
    ("model", "scale"),
    [
        (lambda: EsmModel(EsmConfig(**TINY, **WIDTH, pad_token_id=1, mask_token_id=2)), 1.0),
        (lambda: llama(head_dim=16), 0.25),
    ],
)
def test_the_scale_is_the_models_own(model, scale, exact_estimates):
    model = model().eval().requires_grad_(False)
    model.set_attn_implementation("favor")
    model(**inputs_for(model))
    assert {call["scale"] for call in exact_estimates} == {scale}


@pytest.mark.parametrize(
    ("model", "is_causal"),
    [
        # The keyword says causal, the module says it is not.
        (
            lambda: CLIPTextModel(
                CLIPTextConfig(**TINY, **WIDTH, pad_token_id=1, bos_token_id=2, eos_token_id=3)
            ),
            True,
        ),
        # The keyword says it is not causal, the module says it is.
        (
            lambda: LlamaModel(
                LlamaConfig(**TINY, **WIDTH, num_key_value_heads=2, is_causal=False)
            ),
            False,
        ),
        # The mask is causal, and keyword and module say that they are not.
        (lambda: Aimv2TextModel(Aimv2TextConfig(**TINY, **WIDTH, eos_token_id=3)), True),
    ],
)
def test_the_mask_decides_on_causality_then_the_keyword(model, is_causal, exact_estimates):
    model = model().eval()
    inputs = inputs_for(model)
    model.set_attn_implementation("eager")
    expected = outputs_of(model, inputs)
    model.set_attn_implementation("favor")
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-4, atol=1e-5)
    assert {call["is_causal"] for call in exact_estimates} == {is_causal}


def test_without_a_mask_the_keyword_for_causality_wins(exact_estimates):
    model = LlamaModel(LlamaConfig(**TINY, **WIDTH, num_key_value_heads=2, is_causal=False)).eval()
    ids = inputs_for(model)["input_ids"]
    model.set_attn_implementation("eager")
    expected = model(ids).last_hidden_state
    model.set_attn_implementation("favor")
    found = model(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.layers[0].self_attn.is_causal
    assert not exact_estimates[0]["is_causal"]


def test_cross_attention_is_bidirectional_over_the_keys_of_the_encoder(exact_estimates):
    model = bart()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    model(**inputs)
    cross = [c for c in exact_estimates if c["query"].shape[2] != c["key"].shape[2]]
    assert len(cross) == 2
    for call in cross:
        assert not call["is_causal"]
        assert torch.equal(call["key_padding_mask"], inputs["attention_mask"].bool())


CROSS = {
    "BART": (bart, r"decoder\.layers\.\d\.encoder_attn"),
    "GPT-2": (
        lambda: GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, add_cross_attention=True)),
        r"h\.\d\.crossattention",
    ),
    "GPT-BigCode": (
        lambda: GPTBigCodeModel(
            GPTBigCodeConfig(
                n_embd=32, n_layer=2, n_head=4, multi_query=False, add_cross_attention=True
            )
        ),
        r"h\.\d\.crossattention",
    ),
    "Mllama": (
        lambda: MllamaTextModel(
            MllamaTextConfig(
                **TINY, **WIDTH, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=1
            )
        ),
        r"layers\.1\.cross_attn",
    ),
    "BERT": (
        lambda: bert(is_decoder=True, add_cross_attention=True),
        r"encoder\.layer\.\d\.crossattention\.self",
    ),
    "Whisper": (
        lambda: WhisperModel(WhisperConfig(d_model=48, encoder_layers=1, decoder_layers=1)),
        r"decoder\.layers\.0\.encoder_attn",
    ),
}


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_is_known_by_what_its_module_says(name):
    build, pattern = CROSS[name]
    sites = Sites.of(build())
    cross = {site.name for site in sites if is_cross_attention(site.module)}
    assert cross == {site.name for site in sites if re.fullmatch(pattern, site.name)} != set()


def test_a_window_never_applies_between_two_sequences(exact_estimates):
    model = bart()
    model.config.favor = {"options": FavorOptions(window_size=3).to_dict()}
    model.set_attn_implementation("favor")
    ids = inputs_for(model)["input_ids"]
    model(input_ids=ids, decoder_input_ids=ids)
    windows = [call.get("window_size") for call in exact_estimates]
    assert windows == [3, 3, 3, None, 3, None]  # two of the encoder; self and cross, twice


@pytest.mark.parametrize("name", MODELS)
def test_loading_with_favor_equals_switching_to_it(name, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    model.set_attn_implementation("favor")
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="favor")
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(loaded.eval(), inputs), outputs_of(model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_the_estimate_nears_exact_attention_as_features_are_added(name):
    errors = []
    for num_projections in (8, 2048):
        torch.manual_seed(0)
        model = MODELS[name]().requires_grad_(False)
        for weight in model.parameters():  # a size at which features work
            weight.mul_(0.4)
        inputs = inputs_for(model)
        expected = outputs_of(model, inputs)
        options = FavorOptions(num_projections, "positive", window_size=0)
        model.config.favor = {"options": options.to_dict()}
        model.set_attn_implementation("favor")
        errors.append(float((outputs_of(model, inputs) - expected).norm() / expected.norm()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_gets_a_finite_gradient_under_padding(name):
    model = MODELS[name]().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.set_attn_implementation("favor")
    outputs_of(model, inputs_for(model)).square().sum().backward()
    for weight_name, weight in model.named_parameters():
        if "pooler" not in weight_name:
            assert weight.grad is not None, weight_name
            assert weight.grad.isfinite().all(), weight_name


def test_padding_never_reaches_the_output():
    for model in (bert(), llama(), gpt2()):
        model.set_attn_implementation("favor")
        inputs = inputs_for(model)
        expected = outputs_of(model, inputs)
        hidden = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, 7)
        assert torch.equal(outputs_of(model, inputs), expected)


def test_rows_without_a_key_are_zero_and_poison_nothing():
    model = bert()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    inputs["attention_mask"][0] = 0
    real = inputs["attention_mask"][1].bool()
    outputs = []
    attention = model.encoder.layer[0].attention.self
    attention.register_forward_hook(lambda module, given, out: outputs.append(out[0]))
    assert model(**inputs).last_hidden_state.isfinite().all()
    assert (outputs[0][0] == 0).all()
    assert (outputs[0][1][real] != 0).all()


def test_the_state_dict_has_the_pretrained_names_alone():
    model = llama()
    names = list(model.state_dict())
    model.set_attn_implementation("favor")
    model(**inputs_for(model))
    assert list(model.state_dict()) == names


def test_projections_stay_float32_in_a_bfloat16_model():
    model = bert().to(torch.bfloat16)
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    assert model(**inputs).last_hidden_state.dtype == torch.bfloat16
    model.to(torch.float16).to(torch.bfloat16)
    omega = model.encoder.layer[1].attention.self.favor.feature_map.omega
    expected = performers.SharpFeatures(8, 64, layer=1).omega
    assert torch.equal(omega, expected)


def test_a_first_call_in_inference_mode_or_under_autocast_changes_nothing():
    plain, other = llama(), llama()
    other.load_state_dict(plain.state_dict())
    inputs = inputs_for(plain)
    for model in (plain, other):
        model.config.favor = {"options": {"features": "relu"}}  # their backward pass keeps ω
        model.set_attn_implementation("favor")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        other(**inputs)
    assert torch.equal(outputs_of(plain, inputs), outputs_of(other, inputs))
    outputs_of(other, inputs).sum().backward()


def test_a_growing_cache_gives_the_same_tokens_as_none(exact_estimates):
    model = llama()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    inputs["input_ids"][1, -2:] = 7
    inputs["attention_mask"][1] = 1
    tokens = [
        model.generate(**inputs, max_new_tokens=9, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*tokens)


def test_prefill_in_pieces_equals_the_whole():
    model = llama()
    model.set_attn_implementation("favor")
    ids = inputs_for(model)["input_ids"]
    cache = DynamicCache(config=model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(5, dim=1)]
    whole = model(ids).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_output_attentions_gives_the_matrices_that_make_the_outputs():
    model = bart()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    given = model(**inputs, output_attentions=True)
    assert [x.shape for x in given.encoder_attentions] == [(2, 4, 13, 13)] * 2
    assert [x.shape for x in given.decoder_attentions] == [(2, 4, 11, 11)] * 2
    assert [x.shape for x in given.cross_attentions] == [(2, 4, 11, 13)] * 2
    for weights in given.decoder_attentions:
        assert (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights[1].sum(dim=-1), torch.ones(4, 11))
    assert model(**inputs).cross_attentions is None


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama", "ViT"])
def test_output_attentions_reaches_layers_whether_the_model_passes_it_on_or_not(name):
    model = MODELS[name]()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    assert len(model(**inputs, output_attentions=True).attentions) == 2
    assert not model(**inputs).attentions


def test_dropout_of_keys_has_the_law_of_attention_dropout_for_each_query():
    value = torch.ones(1, 1, 20011, 3)
    dropped = layer.drop_keys(value, 0.3)
    assert ((dropped == 0) | (dropped == 1 / 0.7)).all()
    assert (dropped[..., 0] == dropped[..., 1]).all()
    share = (dropped[..., 0] == 0).double().mean()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 20011) ** 0.5


def test_attention_dropout_acts_in_training_alone():
    model = llama(attention_dropout=0.5)
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(model, inputs), outputs_of(model, inputs))
    model.train()
    assert not torch.equal(outputs_of(model, inputs), outputs_of(model, inputs))


SWIN = {"embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: T5Model(T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
            r"T5Attention of layer 0 attends with a bias for each pair of positions \(position_b",
        ),
        (
            lambda: Gemma2Model(Gemma2Config(**TINY, **WIDTH, num_key_value_heads=2, head_dim=8)),
            r"Gemma2Attention of layer 0 attends with a soft cap on its logits \(softcap=\)",
        ),
        (
            lambda: GptOssModel(
                GptOssConfig(
                    **TINY, **WIDTH, num_key_value_heads=2, head_dim=8, num_local_experts=2
                )
            ),
            r"GptOssAttention of layer 0 attends with attention sinks \(s_aux=\)",
        ),
        (
            lambda: MistralModel(
                MistralConfig(**TINY, **WIDTH, num_key_value_heads=2, sliding_window=7)
            ),
            "MistralAttention of layer 0 attends to a window of 7 positions, and there are 13",
        ),
        (
            lambda: SwinModel(SwinConfig(image_size=16, patch_size=2, **SWIN)),
            r"SwinAttention got a mask of pairs, torch.float32 \(1, 2, 16, 16\)",
        ),
        (
            lambda: BigBirdPegasusModel(
                BigBirdPegasusConfig(
                    vocab_size=WORDS, d_model=32, encoder_layers=1, decoder_layers=1
                )
            ),
            "BigBirdPegasus computes attention, or some of it, by itself",
        ),
        (
            lambda: BloomModel(BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=4)),
            "Bloom computes attention, or some of it, by itself",
        ),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(model, words, tmp_path):
    model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="favor")
    with pytest.raises(ValueError, match=words):
        model(**inputs_for(model))


@pytest.mark.usefixtures("without_shape_checks")
# transformers itself may call a cache so, and then it goes to attention by no name.
@pytest.mark.parametrize("word", [word for word in OTHER_ATTENTION if word != CACHE])
def test_no_argument_that_makes_attention_another_function_is_ignored(word):
    model = llama()  # passes on to its attention what it does not know
    model.set_attn_implementation("favor")
    words = f"LlamaAttention of layer 0 attends with {OTHER_ATTENTION[word].what} ({word}=)"
    with pytest.raises(ValueError, match=re.escape(words)):
        model(**inputs_for(model), **{word: torch.ones(2)})


def test_a_window_longer_than_the_input_is_no_window(exact_estimates):
    sizes = TINY | WIDTH | {"num_key_value_heads": 2, "sliding_window": 13}
    model = MistralModel(MistralConfig(**sizes)).eval()
    inputs = inputs_for(model)
    model.set_attn_implementation("eager")
    expected = outputs_of(model, inputs)
    model.set_attn_implementation("favor")
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-4, atol=1e-5)


# What people make of visible pairs, (batch, 1, length, length): transformers hands it on untouched.
FORMS = {
    "bool": lambda visible: visible,
    "by head": lambda visible: visible.repeat(1, 4, 1, 1),
    "lowest number": lambda visible: torch.zeros(visible.shape).masked_fill(
        ~visible, torch.finfo(torch.float32).min
    ),
    "-1e9": lambda visible: (~visible).float() * -1e9,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT"])
def test_a_mask_of_pairs_that_says_padding_and_causality_is_read(name, form):
    model = MODELS[name]()
    model.set_attn_implementation("favor")
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    mask = inputs["attention_mask"].bool()
    visible = mask[:, None, None]
    if name != "BERT":
        visible = visible & torch.ones(13, 13, dtype=torch.bool).tril()
    positions = torch.arange(13)[None]
    out = model(**inputs | {"attention_mask": FORMS[form](visible), "position_ids": positions})
    out = out[0][mask]
    assert torch.equal(out, outputs_of(model, inputs | {"position_ids": positions}))
    torch.testing.assert_close(out, expected)  # left padding moves nothing else


def test_a_mask_of_pairs_of_new_positions_continues_a_sequence():
    model = llama()
    performers.linearize(model)
    ids = inputs_for(model)["input_ids"]
    visible = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    visible[0, ..., :3] = False
    expected = model(ids, attention_mask=visible, use_cache=False).logits
    cache = performers.FavorCache(model.config)
    outs = [
        model(
            ids[:, start:end],
            attention_mask=visible[..., start:end, :end],
            past_key_values=cache,
        ).logits
        for start, end in ((0, 7), (7, 12), (12, 13))
    ]
    torch.testing.assert_close(torch.cat(outs, dim=1)[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 13, 13)},
            r"mask of pairs, torch.float32 \(2, 1, 13, 13\), and it adds, or learns",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 13, 13, dtype=torch.bool).tril().triu(-4)},
            "and it is not causality and padding: of sequence 0, query 5 does not see key 0",
        ),
    ],
)
def test_masks_of_pairs_are_refused(changes, words):
    model = llama()
    model.set_attn_implementation("favor")
    with pytest.raises(ValueError, match=words):
        model(**inputs_for(model) | changes)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_static_cache_is_refused():
    model = llama()
    model.set_attn_implementation("favor")
    with pytest.raises(ValueError, match="empty places of a cache of fixed length"):
        model.generate(**inputs_for(model), max_new_tokens=3, cache_implementation="static")


def test_registering_again_changes_nothing():
    performers.register()
    model = bert()
    model.set_attn_implementation("favor")
    assert model(**inputs_for(model)).last_hidden_state.isfinite().all()


def test_importing_convert_registers_the_name():
    code = (
        "import performers.convert\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "print('favor' in functions)"
    )
    assert warm_python(code) == "True"
