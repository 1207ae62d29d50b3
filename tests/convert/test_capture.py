"""What is captured from a model is what its attention layers compute with, and it changes none."""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
    EsmConfig,
    EsmModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    T5Config,
    T5Model,
)

from performers.convert import capture_attention, read_captured
from performers.convert.plain_attention import OTHER_ATTENTION
from performers.functional import softmax_attention
from performers.models.naming import CACHE

WORDS = 97
TINY = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH = {"hidden_size": 32, "intermediate_size": 48}
MODELS = {
    "BERT": lambda: BertModel(BertConfig(**TINY, **WIDTH)),
    "ESM": lambda: EsmModel(EsmConfig(**TINY, **WIDTH, pad_token_id=1, mask_token_id=2)),
    "GPT-2": lambda: GPT2Model(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4)),
    "Llama": lambda: LlamaModel(LlamaConfig(**TINY, **WIDTH, num_key_value_heads=2)),
    "BART": lambda: BartModel(
        BartConfig(
            vocab_size=WORDS, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
            decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
        )
    ),
}  # fmt: skip


def tokens(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, WORDS - 5, (2, 31))
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids[:, :29]} if model.config.is_encoder_decoder else {}
    )


@pytest.mark.parametrize("name", MODELS)
def test_capturing_leaves_the_model_as_it_was(name):
    model = MODELS[name]().train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    model.set_attn_implementation("sdpa")
    inputs = tokens(model)
    capture_attention(model, **inputs)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", MODELS)
def test_captured_attention_gives_the_outputs_of_the_layers(name):
    model = MODELS[name]().eval()
    inputs = tokens(model)
    outputs = {}
    for layer, module in model.named_modules():
        # The projection after attention sees what attention gave, its heads side by side.
        if layer.endswith(("attention.output.dense", "o_proj", "c_proj", "out_proj")):
            module.register_forward_pre_hook(
                lambda _, given, layer=layer: outputs.setdefault(layer, given[0])
            )
    captured = capture_attention(model, **inputs)
    assert len(captured) == (3 if name == "BART" else 2)
    found = [
        softmax_attention(x.query, x.key, x.value, x.is_causal, scale=x.scale, enable_gqa=True)
        for x in captured
    ]
    wanted = [out for out in outputs.values() if out.shape[-1] == 32]
    for out in found:
        joined = out.transpose(1, 2).flatten(2)
        assert any(
            other.numel() == joined.numel()
            and torch.allclose(other.reshape(joined.shape), joined, atol=1e-5)
            for other in wanted
        )


def test_grouped_queries_and_cross_attention_keep_their_shapes():
    llama = capture_attention(model := MODELS["Llama"](), **tokens(model))
    assert [x.name for x in llama] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert llama[0].query.shape == (2, 4, 31, 8)
    assert llama[0].key.shape == (2, 2, 31, 8)
    assert all(x.is_causal for x in llama)
    bart = capture_attention(model := MODELS["BART"](), **tokens(model))
    assert [x.is_causal for x in bart] == [False, True, False]
    assert bart[2].query.shape[2] == 29
    assert bart[2].key.shape[2] == 31


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: T5Model(T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=1)),
            r"SelfAttention attends with a bias for each pair of positions \(position_bias=\)",
        ),
        (
            lambda: MistralModel(
                MistralConfig(**TINY, **WIDTH, num_key_value_heads=2, sliding_window=16)
            ),
            r"layers\.0\.self_attn attends with a mask \(of padding, a window",
        ),
        (
            lambda: BloomModel(BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=4)),
            "BloomModel computes attention without transformers' AttentionInterface",
        ),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(model, words):
    model = model()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=words):
        capture_attention(model, **tokens(model))
    assert model.config._attn_implementation == before


# Where models name their cache so, they take it themselves: no word of it reaches their attention.
@pytest.mark.parametrize("word", [word for word in OTHER_ATTENTION if word != CACHE])
def test_no_argument_that_makes_attention_another_function_is_ignored(word):
    model = MODELS["Llama"]()  # passes on to its attention what it does not know
    words = rf"layers\.0\.self_attn attends with {OTHER_ATTENTION[word].what} \({word}=\), which"
    with pytest.raises(ValueError, match=words):
        capture_attention(model, **tokens(model), **{word: torch.ones(2)})


def test_padding_is_refused():
    model = MODELS["BERT"]()
    mask = torch.ones(2, 31, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attends with a mask"):
        capture_attention(model, **tokens(model), attention_mask=mask)


def test_tensors_of_a_file_are_layers_in_their_order(tmp_path):
    path = tmp_path / "attention.safetensors"
    x = torch.randn(1, 2, 5, 3)
    save_file(
        {f"layer.{i}.{part}": x + i for i in (0, 2, 10) for part in ("query", "key", "value")}, path
    )
    layers = read_captured(path, is_causal=True)
    assert [layer.name for layer in layers] == ["layer.0", "layer.2", "layer.10"]
    assert torch.equal(layers[2].value, x + 10)
    assert layers[0].is_causal
    assert layers[0].scale is None


def test_a_file_without_keys_is_refused(tmp_path):
    path = tmp_path / "attention.safetensors"
    save_file({"query": torch.randn(1, 2, 5, 3), "value": torch.randn(1, 2, 5, 3)}, path)
    with pytest.raises(ValueError, match=r"must hold query, key and value.*has query, value\."):
        read_captured(path)
