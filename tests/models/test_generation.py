"""generate() with a state of constant size writes what the run without a cache writes."""

import pytest
import torch
from mechanisms import CAUSAL_KINDS
from torch.nn import functional as F
from transformers import DynamicCache

from performers.models import MECHANISMS as ROWS
from performers.models import PerformerCache, PerformerForCausalLM, PerformerForMaskedLM
from performers.models.memory import KeysAndValues, Nothing, QueriesAndValues, Rerun, State

# Of the mechanisms that run over the whole sequence again one stands for all, but for one test.
RERUN = [
    name
    for name, options in CAUSAL_KINDS.items()
    if issubclass(ROWS[options["attention"]].memory, Rerun) and name not in ("local", "exact")
]
MECHANISMS = {
    **{name: options for name, options in CAUSAL_KINDS.items() if name not in RERUN},
    "grouped queries": {"attention": "performer-positive", "num_key_value_heads": 1},
    "learned positions": {"attention": "performer-relu", "position": "learned"},
}
every_mechanism = pytest.mark.parametrize(
    "mechanism", [pytest.param(options, id=name) for name, options in MECHANISMS.items()]
)
NEW = 13
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 7},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.fixture
def model(tiny_model, mechanism):
    return tiny_model(PerformerForCausalLM, **mechanism, pad_token_id=0)


def written(model, tokens: torch.Tensor, **options) -> torch.Tensor:
    torch.manual_seed(29)  # of sampling
    # Without a mask generate() would take every pad_token_id in the prompt for padding.
    options = {"attention_mask": torch.ones_like(tokens), **options}
    return model.generate(tokens, max_new_tokens=NEW, **options)


@every_mechanism
@pytest.mark.parametrize("mode", MODES)
def test_with_and_without_a_cache_the_same_is_written(model, tokens, mode):
    cached = written(model, tokens, **MODES[mode])
    assert torch.equal(cached, written(model, tokens, **MODES[mode], use_cache=False))
    assert cached.shape[1] == 11 + NEW
    if mode == "sampling":  # the comparison means little if one token is written over and over
        assert len(cached[:, 11:].unique()) > 5


@pytest.mark.parametrize("mechanism", [CAUSAL_KINDS[name] for name in RERUN], ids=RERUN)
def test_a_mechanism_without_a_state_writes_the_same_with_and_without_a_cache(model, tokens):
    padded = torch.cat([torch.randint(31, (3, 5)), tokens], dim=1)
    mask = F.pad(torch.ones_like(tokens), (5, 0))
    cached, again = (
        written(model, padded, do_sample=False, attention_mask=mask, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached, again)


@every_mechanism
@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_padding_on_the_left_changes_nothing_that_is_written(model, tokens, mode):
    padded = torch.cat([torch.randint(31, (3, 5)), tokens], dim=1)
    mask = F.pad(torch.ones_like(tokens), (5, 0))
    options = MODES[mode] | {"attention_mask": mask}
    cached = written(model, padded, **options)
    assert torch.equal(cached, written(model, padded, **options, use_cache=False))
    alone = written(model, tokens, **MODES[mode])
    assert torch.equal(cached[:, 16:], alone[:, 11:])


@every_mechanism
def test_a_prompt_in_chunks_is_the_prompt_at_once(model, tokens):
    at_once = written(model, tokens, do_sample=False)
    assert torch.equal(written(model, tokens, do_sample=False, prefill_chunk_size=4), at_once)
    padded = torch.cat([torch.randint(31, (3, 5)), tokens], dim=1)
    mask = F.pad(torch.ones_like(tokens), (5, 0))
    chunked = written(model, padded, do_sample=False, prefill_chunk_size=3, attention_mask=mask)
    assert torch.equal(chunked[:, 16:], at_once[:, 11:])


@every_mechanism
def test_a_second_turn_continues_the_cache_of_the_first(model, tokens):
    cache = PerformerCache(model.config)
    first = written(model, tokens, do_sample=False, past_key_values=cache)
    reply = torch.cat([first, tokens.flip(1)], dim=1)
    second = written(model, reply, do_sample=False, past_key_values=cache)
    assert torch.equal(second, written(model, reply, do_sample=False, use_cache=False))
    assert cache.get_seq_length() == second.shape[1] - 1  # the last token was never read


@every_mechanism
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 5, 1], [2, 9]])
def test_pieces_through_the_cache_give_the_logits_of_the_whole(model, tokens, pieces):
    cache = PerformerCache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in tokens.split(pieces, dim=1)]
    torch.testing.assert_close(
        torch.cat(logits, dim=1), model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mechanism", [MECHANISMS["window"], MECHANISMS["performer-relu"]])
def test_the_state_has_one_size_at_every_length(model, tokens):
    def size(cache: PerformerCache) -> int:
        return sum(x.numel() for layer in cache.layers for x in layer.state.parts().values())

    short, long = PerformerCache(model.config), PerformerCache(model.config)
    model(tokens[:, :1], past_key_values=short)
    model(tokens.repeat(1, 100), past_key_values=long)
    assert long.get_seq_length() == 1100
    assert size(long) == size(short)
    # 2 layers × 3 rows × 3 heads × 17 features × (8 values, normalizer, scale); with a window two
    # blocks of 3 keys and values, and a count per row
    sums = 2 * 3 * 3 * 17 * 10
    near = 2 * 3 * 3 * 2 * 3 * (8 + 8) + 2 * 3
    assert size(long) == sums + (near if model.config.window_size else 0)


@pytest.mark.parametrize(
    ("mechanism", "memory"),
    [
        (MECHANISMS["performer-relu"], State),
        (MECHANISMS["exact"], KeysAndValues),
        (MECHANISMS["identity"], Nothing),
        (MECHANISMS["local"], Rerun),
        (CAUSAL_KINDS["reformer"], QueriesAndValues),
    ],
)
def test_every_mechanism_has_the_memory_it_needs(model, tokens, memory):
    cache = model(tokens).past_key_values
    assert [type(layer) for layer in cache.layers] == [memory, memory]


@pytest.mark.parametrize("mechanism", [MECHANISMS["exact"]])
def test_a_token_of_exact_attention_is_one_query(model, tokens):
    cache = model(tokens[:, :-1]).past_key_values
    lengths = []
    mechanism = model.performer.layers[0].attention.mechanism
    mechanism.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[2]))
    logits = model(tokens[:, -1:], past_key_values=cache).logits
    assert lengths == [1]  # not of the whole sequence, which costs its length as often
    torch.testing.assert_close(logits, model(tokens).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [State, Nothing])
def test_a_memory_of_one_size_has_no_limit_and_nothing_to_allocate(memory):
    layer = memory()
    assert layer.get_max_length() == -1  # transformers' word for no limit
    assert layer.get_mask_sizes(5) == (5, 0)
    layer.lazy_initialization(torch.zeros(1), torch.zeros(1))
    assert layer.is_initialized
    assert layer.get_seq_length() == 0


@every_mechanism
def test_batch_rows_of_a_cache_can_be_reordered_chosen_and_repeated(model, tokens):
    head, tail = tokens[:, :7], tokens[:, 7:]

    def continued(change, rows: torch.Tensor) -> torch.Tensor:
        cache = PerformerCache(model.config)
        change(cache)  # an empty cache has no rows, which is no error
        model(head, past_key_values=cache)
        change(cache)
        return model(tail[rows], past_key_values=cache).logits

    changes = {
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (1,): lambda cache: cache.batch_select_indices(torch.tensor([1])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    }
    whole = model(tokens, use_cache=False).logits[:, 7:]
    for rows, change in changes.items():
        torch.testing.assert_close(
            continued(change, torch.tensor(rows)), whole[list(rows)], rtol=1e-4, atol=1e-4
        )


@every_mechanism
def test_a_reset_cache_is_a_new_one(model, tokens):
    cache = PerformerCache(model.config)
    first = model(tokens, past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(tokens, past_key_values=cache).logits, first)


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
@pytest.mark.parametrize("how", ["prompt lookup", "an assistant", "crop"])
def test_what_would_take_tokens_back_is_refused(model, tokens, how):
    def take_back() -> None:
        if how == "crop":
            cache = PerformerCache(model.config)
            model(tokens, past_key_values=cache)
            cache.crop(-2)
        elif how == "prompt lookup":
            written(model, tokens[:1], prompt_lookup_num_tokens=3)
        else:
            written(model, tokens[:1], assistant_model=model)

    with pytest.raises(NotImplementedError, match="cannot give the last ones back"):
        take_back()


@pytest.mark.parametrize("mechanism", [MECHANISMS["exact"], MECHANISMS["identity"]])
def test_other_memories_do_take_tokens_back(model, tokens):
    greedy = written(model, tokens[:1], do_sample=False)
    looked_up = written(model, tokens[:1], do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)

    cache = PerformerCache(model.config)
    model(tokens, past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 7
    again = model(tokens[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens).logits[:, 7:], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
def test_a_cache_of_another_kind_is_refused(model, tokens):
    with pytest.raises(TypeError, match=r"PerformerCache, got DynamicCache\. Make it with"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="got cache_implementation='static'"):
        written(model, tokens, cache_implementation="static")
    with pytest.raises(TypeError, match="State keeps no keys and values"):
        PerformerCache(model.config).update(torch.zeros(1), torch.zeros(1), 0)


def test_a_bidirectional_model_takes_no_cache_and_makes_none(tiny_model, tokens):
    body = tiny_model(PerformerForMaskedLM).performer
    assert body(tokens, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="this model is bidirectional"):
        body(tokens, past_key_values=PerformerCache(body.config))


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
def test_a_mask_that_leaves_out_the_cached_positions_is_refused(model, tokens):
    cache = PerformerCache(model.config)
    model(tokens, past_key_values=cache)
    mask = torch.ones(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"= \(3, 12\), the cached positions included, got \(3, 1"):
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
def test_attentions_need_the_whole_sequence(model, tokens):
    cache = model(tokens, output_attentions=True).past_key_values
    with pytest.raises(ValueError, match="needs the keys of the whole sequence"):
        model(tokens[:, :1], past_key_values=cache, output_attentions=True)


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
def test_training_makes_no_cache_unless_asked(model, tokens):
    model.train()
    assert model(tokens).past_key_values is None
    assert model(tokens, use_cache=True).past_key_values is not None
    model.activation_checkpointing_enable()
    assert model(tokens, use_cache=True).past_key_values is None


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-relu"]])
def test_only_the_logits_asked_for_are_computed(model, tokens):
    logits = model(tokens).logits
    assert torch.equal(model(tokens, logits_to_keep=3).logits, logits[:, -3:])
    kept = torch.tensor([0, 5])
    assert torch.equal(model(tokens, logits_to_keep=kept).logits, logits[:, kept])


@pytest.mark.parametrize("mechanism", [MECHANISMS["performer-positive"], MECHANISMS["window"]])
def test_in_bfloat16_the_state_is_float32(model, tokens):
    model.to(torch.bfloat16)
    cache = model(tokens).past_key_values
    assert cache.layers[0].state.values.dtype == torch.float32
    assert written(model, tokens, do_sample=False).shape == (3, 11 + NEW)


def test_continuous_batching_is_refused_with_the_reason(tiny_model):
    model = tiny_model(PerformerForCausalLM, attention="performer-relu")
    with pytest.raises(NotImplementedError, match="linear attention keeps a sum in their place"):
        model.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=3)
