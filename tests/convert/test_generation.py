"""A converted model that generates from states writes what it writes without a cache."""

import copy

import pytest
import torch
from tiny_models import LARGE, TINY, WIDTH, WORDS, llama
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TextStreamer,
)

from performers import FavorCache, FavorOptions, calibrate, linearize, restore
from performers.convert.cache import PREPARE_CACHE, FavorMemory
from performers.convert.linearize import converted_layers

LENGTH, NEW = 11, 13
OPTIONS = FavorOptions(num_projections=17, window_size=0)
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}


def gpt2() -> GPT2LMHeadModel:
    tokens = {"bos_token_id": None, "eos_token_id": None}
    sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, **LARGE, **tokens)).eval()


def qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**TINY, **WIDTH, **LARGE, **GROUPED)).eval()


def mistral() -> MistralForCausalLM:
    config = MistralConfig(**TINY, **WIDTH, **LARGE, **GROUPED, sliding_window=None)
    return MistralForCausalLM(config).eval()


def gemma3() -> Gemma3ForCausalLM:
    """A window in its first layer, which stays exact, and none in the second."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
    kinds |= {"tie_word_embeddings": False}
    config = Gemma3TextConfig(**TINY, **WIDTH, **LARGE, **GROUPED, **kinds)
    return Gemma3ForCausalLM(config).eval()


CONVERSIONS = {
    "Llama": (llama, OPTIONS),
    "GPT-2": (gpt2, OPTIONS),
    "Qwen3": (qwen3, OPTIONS),
    "Mistral": (mistral, OPTIONS),
    "Gemma 3": (gemma3, OPTIONS),
    "in part": (lambda: llama(num_hidden_layers=3), FavorOptions(17, window_size=0, layers=[1])),
    "window": (llama, FavorOptions(17, window_size=3, num_sinks=0)),
    "heads": (llama, FavorOptions(17, window_size=0, exact_heads={1: [0, 3]})),
    "heads, window": (llama, FavorOptions(17, window_size=3, num_sinks=0, exact_heads={0: [2]})),
    "relu": (llama, FavorOptions(17, features="relu")),
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 7},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.fixture
def model(request) -> PreTrainedModel:
    make, options = CONVERSIONS[getattr(request, "param", "Llama")]
    return linearize(make(), options)


every_conversion = pytest.mark.parametrize("model", CONVERSIONS, indirect=True)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(5, WORDS, (3, LENGTH))


def written(model: PreTrainedModel, tokens: torch.Tensor, **options) -> torch.Tensor:
    torch.manual_seed(29)  # of sampling
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False} | options
    ends = {"eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, max_new_tokens=NEW, **ends, **options)


def padded(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens with nonsense on their left, and the mask that hides it."""
    nonsense = torch.randint(5, WORDS, (len(tokens), 5))
    return torch.cat([nonsense, tokens], dim=1), F.pad(torch.ones_like(tokens), (5, 0))


@every_conversion
@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_a_cache_the_same_is_written(model, tokens, mode):
    cached = written(model, tokens, **MODES[mode])
    assert torch.equal(cached, written(model, tokens, **MODES[mode], use_cache=False))
    assert len(cached[:, LENGTH:].unique()) > 9  # one token over and over would prove little


@every_conversion
def test_generate_keeps_states_without_being_asked(model, tokens):
    cache = written(model, tokens, return_dict_in_generate=True).past_key_values
    assert isinstance(cache, FavorCache)
    with_states = [n for n, layer in enumerate(cache.layers) if isinstance(layer, FavorMemory)]
    layers = converted_layers(model).values()
    assert with_states == [x.number for x in layers if x.number not in x.options.exact_heads]


@pytest.mark.parametrize(
    ("model", "mode"),
    [*((name, "greedy") for name in CONVERSIONS), ("Llama", "beams")],
    indirect=["model"],
)
def test_padding_on_the_left_changes_nothing_that_is_written(model, tokens, mode):
    longer, mask = padded(tokens)
    options = MODES[mode] | {"attention_mask": mask}
    cached = written(model, longer, **options)
    assert torch.equal(cached, written(model, longer, **options, use_cache=False))
    assert torch.equal(cached[:, -NEW:], written(model, tokens, **MODES[mode])[:, -NEW:])


@every_conversion
def test_a_prompt_in_chunks_is_the_prompt_at_once(model, tokens):
    longer, mask = padded(tokens)
    at_once = written(model, longer, attention_mask=mask)
    in_chunks = written(model, longer, attention_mask=mask, prefill_chunk_size=3)
    assert torch.equal(in_chunks, at_once)


@every_conversion
def test_turns_continue_one_cache_and_a_copy_of_it(model, tokens):
    cache = FavorCache(model.config)
    turn = written(model, tokens, past_key_values=cache)
    assert torch.equal(turn, written(model, tokens))
    longer = torch.cat([turn, torch.randint(5, WORDS, (3, 7))], dim=1)
    kept = copy.deepcopy(cache)
    whole = written(model, longer)
    for one in (cache, kept):  # neither sees what the other has
        assert torch.equal(written(model, longer, past_key_values=one), whole)
    cache.reset()
    assert torch.equal(written(model, tokens, past_key_values=cache), turn)


def test_rows_of_a_cache_can_be_chosen_and_repeated(model, tokens):
    def logits(tokens: torch.Tensor, cache: FavorCache) -> torch.Tensor:
        return model(tokens, past_key_values=cache).logits

    prompt, last = tokens[:, :-1], tokens[:, -1:]
    cache, kept = FavorCache(model.config), FavorCache(model.config)
    logits(prompt, cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([4, 1]))
    logits(prompt[[2, 0]], kept)
    rows = last[[2, 0]]
    torch.testing.assert_close(logits(rows, cache), logits(rows, kept))


@pytest.mark.parametrize("window_size", [0, 3])
def test_the_size_of_a_state_does_not_depend_on_the_length(window_size):
    model = linearize(llama(), FavorOptions(17, window_size=window_size, num_sinks=0))

    def num_elements(length: int) -> int:
        cache = FavorCache(model.config)
        model(torch.randint(5, WORDS, (2, length)), past_key_values=cache)
        assert cache.get_seq_length() == length
        return sum(part.numel() for layer in cache.layers for part in layer.state.parts().values())

    assert num_elements(11) == num_elements(211)


def test_a_calibrated_model_generates_from_states(tokens):
    model = linearize(llama(), OPTIONS)
    plain = written(model, tokens)
    calibrate(model, [{"input_ids": torch.randint(5, WORDS, (3, 101))}])
    cached = written(model, tokens)
    assert torch.equal(cached, written(model, tokens, use_cache=False))
    assert not torch.equal(cached, plain)


def test_a_bare_switch_takes_a_cache_that_is_given(tokens):
    model = llama()
    model.set_attn_implementation("favor")
    expected = written(model, tokens, use_cache=False)
    assert torch.equal(written(model, tokens), expected)  # from all keys
    assert torch.equal(written(model, tokens, past_key_values=FavorCache(model.config)), expected)


def test_layers_that_stayed_exact_take_several_tokens_without_a_mask(tokens):
    model = linearize(llama(num_hidden_layers=3), FavorOptions(17, window_size=0, layers=[1]))
    expected = model(tokens, use_cache=False).logits
    for cache in (FavorCache(model.config), DynamicCache(config=model.config)):
        parts = [model(part, past_key_values=cache).logits for part in tokens.split([5, 6], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_words_are_streamed(model, tokens):
    class Words:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def decode(self, ids: list[int], **options: object) -> str:
            self.seen = [int(i) for i in ids]
            return ""

    words = Words()
    row = tokens[:1]
    out = written(model, row, streamer=TextStreamer(words, skip_prompt=True))
    assert words.seen == out[0, LENGTH:].tolist()


def test_restoring_gives_generation_back(model, tokens):
    exact = llama()
    exact.load_state_dict(model.state_dict())
    restore(model)
    assert PREPARE_CACHE not in vars(model)
    given = written(model, tokens, return_dict_in_generate=True)
    assert type(given.past_key_values) is DynamicCache
    assert torch.equal(given.sequences, written(exact, tokens))


def test_a_copy_of_a_model_generates_for_itself(model, tokens):
    twin = copy.deepcopy(model)
    for weight in twin.parameters():
        nn.init.zeros_(weight)
    assert not written(twin, tokens)[:, LENGTH:].any()


def test_where_transformers_has_another_method_all_keys_are_kept(monkeypatch, tokens):
    original = getattr(LlamaForCausalLM, PREPARE_CACHE)
    monkeypatch.setattr(LlamaForCausalLM, PREPARE_CACHE, lambda self, *rest: original(self, *rest))
    model = linearize(llama(), OPTIONS)
    given = written(model, tokens, return_dict_in_generate=True)
    assert type(given.past_key_values) is DynamicCache
    assert torch.equal(given.sequences, written(model, tokens, use_cache=False))


def bart(**changes) -> BartForConditionalGeneration:
    sizes = {"ffn_dim": 48, "attention_heads": 4}
    sizes = {f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in sizes.items()}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "init_std": 0.3}
    return BartForConditionalGeneration(BartConfig(vocab_size=WORDS, **sizes)).eval()


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("features", ["positive", "sharp"])
def test_a_decoder_keeps_states_and_the_keys_of_its_encoder(tokens, features, mode):
    model = linearize(bart(), FavorOptions(17, features=features, window_size=3, num_sinks=0))
    cached = written(model, tokens, **MODES[mode], return_dict_in_generate=True)
    cache = cached.past_key_values
    assert isinstance(cache, EncoderDecoderCache)
    assert [type(layer) for layer in cache.self_attention_cache.layers] == [FavorMemory] * 2
    assert cache.cross_attention_cache.layers[0].keys.shape[2] == LENGTH
    assert torch.equal(cached.sequences, written(model, tokens, **MODES[mode], use_cache=False))
    given = EncoderDecoderCache(FavorCache(model.config), DynamicCache())
    assert torch.equal(
        written(model, tokens, **MODES[mode], past_key_values=given), cached.sequences
    )


# What a sum that forgets nothing cannot do.


def test_assisted_decoding_is_refused_and_works_with_all_keys(model, tokens):
    row = tokens[:1].repeat(1, 2)
    assistants = ({"prompt_lookup_num_tokens": 3}, {"assistant_model": llama(num_hidden_layers=1)})
    for assistant in assistants:
        with pytest.raises(NotImplementedError, match=r"cannot give the last ones back.*Dynamic"):
            written(model, row, **assistant)
        assisted = written(
            model, row, **assistant, past_key_values=DynamicCache(config=model.config)
        )
        assert torch.equal(assisted, written(model, row))


def test_cropping_is_refused(model, tokens):
    cache = FavorCache(model.config)
    written(model, tokens, past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match=r"DynamicCache\(config=model.config\)"):
        cache.crop(-1)
    cache.crop(0)  # nothing to forget


def test_static_caches_are_refused(model, tokens):
    with pytest.raises(ValueError, match="empty places of a cache of fixed length"):
        written(model, tokens, cache_implementation="static")


def test_statistics_of_a_call_are_refused(tokens):
    model = linearize(llama(), FavorOptions(17, statistics="call"))
    with pytest.raises(ValueError, match="would let a position see its future"):
        written(model, tokens)


def test_matrices_of_attention_are_refused_with_a_state_and_given_without(model, tokens):
    asked = {"output_attentions": True, "return_dict_in_generate": True}
    with pytest.raises(ValueError, match=r"FavorCache does not keep them.*use_cache=False"):
        written(model, tokens, **asked)
    given = written(model, tokens, **asked, use_cache=False)
    assert given.attentions[-1][0].shape == (3, 4, LENGTH + NEW - 1, LENGTH + NEW - 1)
    cache = FavorCache(model.config)
    first = model(tokens, past_key_values=cache, output_attentions=True)
    torch.testing.assert_close(first.logits, model(tokens, use_cache=False).logits)
    assert first.attentions[0].shape == (3, 4, LENGTH, LENGTH)
    torch.testing.assert_close(first.attentions[0].sum(dim=-1), torch.ones(3, 4, LENGTH))


def test_a_window_of_the_model_itself_is_refused_when_states_outgrow_it(tokens):
    config = MistralConfig(**TINY, **WIDTH, **LARGE, **GROUPED, sliding_window=LENGTH + 2)
    model = linearize(MistralForCausalLM(config).eval(), OPTIONS)
    cache = FavorCache(config)
    for _ in range(2):
        model(tokens[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="window"):
        written(model, tokens)


def test_a_cache_for_keys_that_attention_does_not_get_is_refused(tokens):
    exact, converted = llama(), linearize(llama(), OPTIONS)
    with pytest.raises(RuntimeError, match=r"layer 0 of a FavorCache .* attention did not get"):
        written(exact, tokens, past_key_values=FavorCache(converted.config))


def test_keys_that_are_changed_on_their_way_are_refused_before_they_are_missed(
    model, tokens, monkeypatch
):
    update = FavorMemory.update

    def changed(self, key, value, *rest, **options):
        key, value = update(self, key, value, *rest, **options)
        return key.clone(), value

    monkeypatch.setattr(FavorMemory, "update", changed)
    cache = FavorCache(model.config)
    first = model(tokens, past_key_values=cache)  # so far no key is missing
    torch.testing.assert_close(first.logits, model(tokens, use_cache=False).logits)
    with pytest.raises(RuntimeError, match="changes keys that the cache has returned"):
        model(tokens[:, :1], past_key_values=cache)


@pytest.mark.parametrize("options", [{"layers": [1]}, {"exact_heads": {0: [3]}}])
def test_a_cache_of_other_layers_is_refused(tokens, options):
    model = linearize(llama(), FavorOptions(17, **options))
    every = FavorCache(llama().config)
    with pytest.raises(ValueError, match=r"of layer 0 got keys .*FavorCache\(model.config\)"):
        model(tokens, past_key_values=every)


def test_layers_that_share_their_keys_do_not_share_a_state(model, tokens):
    cache = FavorCache(model.config)
    cache.layers[1] = cache.layers[0]
    with pytest.raises(ValueError, match=r"of layer 1 got keys .* or layers share their keys"):
        model(tokens, past_key_values=cache)


def test_keys_of_an_encoder_do_not_enter_a_state(tokens):
    model = linearize(bart(), FavorOptions(17, features="positive", window_size=0))
    given = EncoderDecoderCache(FavorCache(model.config), FavorCache(model.config))
    with pytest.raises(ValueError, match="or this is cross-attention"):
        written(model, tokens, past_key_values=given)


COMPILED = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from performers import FavorCache, FavorOptions, linearize

torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
linearize(model, FavorOptions(17, window_size=WINDOW, num_sinks=0))
tokens = torch.randint(5, 97, (3, 11))


def steps(forward):
    cache = FavorCache(model.config)
    out = [model(tokens, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(13):
        logits = forward(input_ids=out[-1], past_key_values=cache).logits
        out.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(out, dim=1)


with torch.no_grad():
    expected = steps(model.forward)
    compiled = torch.compile(model.forward, fullgraph=True)
    assert torch.equal(steps(compiled), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        print(torch.equal(steps(compiled), expected))
"""


@pytest.mark.slow
@pytest.mark.parametrize("window_size", [0, 3])
def test_a_compiled_step_writes_the_same_and_is_compiled_once(window_size, fresh_python):
    assert fresh_python(COMPILED.replace("WINDOW", repr(window_size))) == "True"


@pytest.mark.usefixtures("without_shape_checks")
def test_continuous_batching_is_refused_with_the_reason_until_restored():
    model = linearize(llama())
    with pytest.raises(NotImplementedError, match="linear attention keeps a sum in their place"):
        model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=3)
    assert "init_continuous_batching" not in vars(restore(model))
