"""Packed sequences in converted models: each as if it were alone."""

import pytest
import torch
from tiny_models import TINY, WIDTH, WORDS, bert, llama
from transformers import (
    DataCollatorWithFlattening,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from performers import FavorCache, FavorOptions, calibrate, linearize
from performers.convert import capture_attention

LENGTHS = (7, 1, 13, 2)
SEQUENCES = [
    {"input_ids": torch.arange(length).mul(3).add(length).remainder(31).tolist()}
    for length in LENGTHS
]
OPTIONS = FavorOptions(17, window_size=3, num_sinks=1)


def gpt2():
    tokens = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, **tokens)
    ).eval()


def gemma3():
    sizes = TINY | WIDTH | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, layer_types=kinds)).eval()


CAUSAL = {"Llama": llama, "GPT-2": gpt2, "Gemma 3": gemma3}


def flattened(**options):
    return DataCollatorWithFlattening(**options)(SEQUENCES) | {"use_cache": False}


def alone(model):
    rows = [torch.tensor([sequence["input_ids"]]) for sequence in SEQUENCES]
    return torch.cat([model(row, use_cache=False).logits for row in rows], dim=1)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize(
    "options",
    [OPTIONS, FavorOptions(17, "relu"), FavorOptions(17, window_size=3, exact_heads={1: [2]})],
    ids=["near field", "relu", "an exact head"],
)
def test_positions_that_restart_are_packed_sequences(name, options):
    model = linearize(CAUSAL[name](), options)
    torch.testing.assert_close(model(**flattened()).logits, alone(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAUSAL)
def test_layers_that_stay_exact_see_packed_sequences_too(name):
    model = linearize(CAUSAL[name](), FavorOptions(17, window_size=3, layers=[1]))
    torch.testing.assert_close(model(**flattened()).logits, alone(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", ["return_flash_attn_kwargs", "return_seq_idx"])
def test_a_window_ends_where_a_packed_sequence_does(word):
    """Lengths and numbers reach attention alone; the mask of the window is made without them."""
    # A window of the whole length is exact, and so does not mind that positions go on.
    model = linearize(gemma3(), FavorOptions(window_size=32, layers=[1]))
    given = flattened(**{word: True}, return_position_ids=False) | {"use_cache": False}
    given.pop("labels", None)
    torch.testing.assert_close(model(**given).logits, alone(model), rtol=1e-4, atol=1e-4)


def test_exact_packed_sequences_are_those_of_the_exact_model():
    model = llama()
    expected = model(**flattened()).logits
    linearize(model, FavorOptions(window_size=32))  # a window of the whole length is exact
    torch.testing.assert_close(model(**flattened()).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
    ],
)
@pytest.mark.parametrize("build", [llama, bert])
def test_lengths_and_numbers_say_it_too_and_in_both_directions(build, options):
    model = linearize(build(), OPTIONS)
    layer = model.base_model.get_submodule(
        "layers.0.self_attn" if build is llama else "encoder.layer.0.attention.self"
    )
    seen = []
    layer.favor.register_forward_pre_hook(
        lambda module, given, named: seen.append(named.get("segment_ids")), with_kwargs=True
    )
    given = flattened(**options) | {"use_cache": False}
    given.pop("labels")
    model(**given)
    lengths = torch.unique_consecutive(seen[0], return_counts=True)[1]
    assert tuple(lengths.tolist()) == LENGTHS


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_mask_of_blocks_is_packed_sequences(is_causal):
    model = linearize(llama() if is_causal else bert(), OPTIONS)
    given = flattened()
    number = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    visible = number == number[:, None]
    visible = visible.tril() if is_causal else visible
    positions = given["position_ids"]
    arguments = {"input_ids": given["input_ids"], "position_ids": positions}
    arguments |= {"use_cache": False} if is_causal else {}
    rows = [torch.tensor([sequence["input_ids"]]) for sequence in SEQUENCES]
    expected = torch.cat([model(row)[0] for row in rows], dim=1)
    for mask in (visible, torch.where(visible, 0.0, -torch.inf)):
        found = model(**arguments, attention_mask=mask[None, None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_nothing_leaks_from_one_packed_sequence_to_another():
    model = linearize(llama(), OPTIONS)
    given = flattened()
    before = model(**given).logits
    given["input_ids"][0, 8:21] = 5
    after = model(**given).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert torch.equal(before[:, 21:], after[:, 21:])
    assert not torch.equal(before[:, 8:21], after[:, 8:21])


def test_gradients_of_packed_sequences_are_the_sums_of_those_alone():
    model = linearize(llama(initializer_range=0.05), OPTIONS)
    packed, single = (
        torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        for logits in (model(**flattened()).logits, alone(model))
    )
    for found, expected in zip(packed, single, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_positions_of_padded_rows_are_no_packing():
    model = linearize(llama(), OPTIONS)
    ids = torch.randint(5, WORDS, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    bare = model(ids[:1, 4:]).logits
    torch.testing.assert_close(padded[:1, 4:], bare, rtol=1e-4, atol=1e-4)


def test_calibration_reads_packed_sequences_through_the_exact_model():
    model = linearize(llama(), OPTIONS)
    calibrate(model, [flattened()])
    torch.testing.assert_close(model(**flattened()).logits, alone(model), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("without_shape_checks")
def test_packed_sequences_and_a_cache_are_refused():
    model = linearize(llama(), OPTIONS)
    cache = FavorCache(model.config)
    with pytest.raises(ValueError, match="packed sequences and a FavorCache"):
        model(**flattened() | {"use_cache": True}, past_key_values=cache)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("word", ["cu_seq_lens_q", "seq_idx"])
def test_captured_attention_is_of_one_sequence(word):
    given = flattened(return_flash_attn_kwargs=True, return_seq_idx=True)
    with pytest.raises(ValueError, match=rf"packed sequences \({word}=\)"):
        capture_attention(llama(), **{name: given[name] for name in ("input_ids", word)})


# In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
COMPILED = """
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel
from performers import FavorOptions, linearize

MODELS = {{
    # Hands positions on to attention, and one that does not.
    "llama": lambda: LlamaModel(LlamaConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)),
}}
torch.manual_seed(0)
model = linearize(MODELS[{name!r}]().eval(), FavorOptions(7, window_size=3))
whole = torch.compile(model, fullgraph=True, backend="eager")
broken = torch.compile(lambda **given: model(**given), backend="eager")  # its own code
counting, restarting = torch.arange(23)[None], torch.arange(23)[None] % 7
numbers = torch.arange(23)[None] // 7
ends = torch.tensor([0, 7, 14, 21, 23], dtype=torch.int32)
for compiled, words in [
    (whole, {{"position_ids": counting}}),
    (broken, {{"position_ids": restarting, "seq_idx": numbers.int()}}),
    (broken, {{"position_ids": restarting, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends}}),
    (whole, {{"position_ids": restarting}}),
]:
    given = {{"input_ids": torch.randint(31, (1, 23)), "use_cache": False}} | words
    try:
        torch.testing.assert_close(compiled(**given)[0], model(**given)[0])
        print("equal")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_models_see_packed_sequences_that_are_numbered_and_refuse_restarts(
    fresh_python, name
):
    *equal, refusal = fresh_python(COMPILED.format(name=name)).splitlines()
    assert equal == ["equal"] * 3
    assert refusal.startswith("positions that restart pack several sequences into a row")
