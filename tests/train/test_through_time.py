"""Training on a sequence chunk by chunk is training on the whole, in the memory of a chunk."""

import copy
import weakref

import pytest
import torch
from tiny_models import WORDS, llama

from performers import (
    FavorOptions,
    PerformerConfig,
    PerformerForCausalLM,
    backward_through_time,
    linearize,
)
from performers.convert import saved_states
from performers.train import through_time

SIZES = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "num_projections": 17,
}


def causal(**changes):
    return PerformerForCausalLM(PerformerConfig(**SIZES | changes))


MODELS = {
    "relu": causal,
    "positive with a window": lambda: causal(attention="performer-positive", window_size=4),
    "Llama": lambda: linearize(llama(), FavorOptions(num_projections=17, window_size=0)),
    "Llama with a window": lambda: linearize(
        llama(), FavorOptions(num_projections=17, window_size=4, num_sinks=2)
    ),
}


def gradients(model):
    return {name: x.grad for name, x in model.named_parameters()}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("name", "kept_states"),
    [("relu", 3), ("positive with a window", 16), ("Llama", 16), ("Llama with a window", 2)],
)
def test_chunks_through_time_have_the_loss_and_the_gradients_of_the_whole(name, kept_states):
    model = MODELS[name]().double().train()
    ids = torch.randint(5, WORDS, (2, 47))
    labels = ids.masked_fill(torch.rand(2, 47) < 0.3, -100)
    whole = copy.deepcopy(model)
    expected = whole(ids, labels=labels, use_cache=False).loss
    expected.backward()
    # Seven chunks, of which the last has five tokens.
    loss = backward_through_time(model, ids, labels, chunk_length=7, kept_states=kept_states)
    torch.testing.assert_close(loss, expected.detach().double(), rtol=1e-6, atol=0)
    for parameter, x in gradients(whole).items():
        atol = 1e-6 * float(x.abs().max()) + 1e-12
        torch.testing.assert_close(
            gradients(model)[parameter], x, rtol=0, atol=atol, msg=lambda m, n=parameter: f"{n} {m}"
        )


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("kept_states", "passes"), [(2, 5), (6, 2), (32, 1)])
def test_states_are_kept_as_asked_and_chunks_are_computed_accordingly_often(
    kept_states, passes, monkeypatch
):
    model = causal(num_hidden_layers=1)
    ids = torch.randint(5, WORDS, (1, 32))
    calls, made, most = [], [], 0
    read = through_time._Chunk.read

    def counted(self, states):
        nonlocal most
        calls.append(torch.is_grad_enabled())
        most = max(most, sum(one() is not None for one in made))
        logits, after = read(self, states)
        made.append(weakref.ref(after))
        return logits, after

    monkeypatch.setattr(through_time._Chunk, "read", counted)
    backward_through_time(model, ids, chunk_length=1, kept_states=kept_states)
    assert sum(calls) == 32
    assert len(calls) - 32 <= passes * 32
    assert most <= kept_states * passes


def test_dropout_is_the_same_each_time_a_chunk_is_computed(monkeypatch):
    model = causal(hidden_dropout_prob=0.5).train()
    ids = torch.randint(5, WORDS, (1, 12))
    seen = {}
    read = through_time._Chunk.read

    def recorded(self, states):
        logits, after = read(self, states)
        seen.setdefault(self.seed, []).append(logits.detach())
        return logits, after

    monkeypatch.setattr(through_time._Chunk, "read", recorded)
    backward_through_time(model, ids, chunk_length=4, kept_states=2)
    assert len(seen) == 3
    first = seen[min(seen)]
    assert len(first) > 1
    assert all(torch.equal(first[0], other) for other in first)


@pytest.mark.usefixtures("without_shape_checks")
def test_what_has_no_states_or_does_not_fit_is_refused():
    ids = torch.randint(5, WORDS, (1, 12))
    with pytest.raises(ValueError, match="layer 0 keeps a KeysAndValues in its cache"):
        backward_through_time(causal(attention="exact"), ids)
    with pytest.raises(ValueError, match="input_ids and labels must be"):
        backward_through_time(causal(), ids, ids[:, 1:])
    with pytest.raises(ValueError, match="kept_states must be"):
        backward_through_time(causal(), ids, kept_states=1)
    model = causal()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="activation checkpointing runs layers again"):
        backward_through_time(model, ids)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", MODELS)
def test_generation_continues_from_a_saved_state(name, tmp_path):
    model, other = MODELS[name]().eval(), MODELS[name]().eval()
    other.load_state_dict(model.state_dict())
    book, more = torch.randint(5, WORDS, (2, 19)), torch.randint(5, WORDS, (2, 3))
    expected = model(torch.cat([book, more], dim=1), use_cache=False).logits[:, 19:]
    cache = saved_states.new_cache(model)
    model(book, past_key_values=cache)
    saved_states.save_state(cache, tmp_path / "book.safetensors")
    loaded = saved_states.load_state(other, tmp_path / "book.safetensors")
    torch.testing.assert_close(other(more, past_key_values=loaded).logits, expected)
    continued = other.generate(
        torch.cat([book, more], dim=1),
        past_key_values=saved_states.load_state(other, tmp_path / "book.safetensors"),
        max_new_tokens=3,
        do_sample=False,
    )
    plain = model.generate(torch.cat([book, more], dim=1), max_new_tokens=3, do_sample=False)
    assert torch.equal(continued, plain)


@pytest.mark.usefixtures("without_shape_checks")
def test_states_of_other_features_layers_and_files_are_refused(tmp_path):
    path = tmp_path / "book.safetensors"
    model, ids = causal().eval(), torch.randint(5, WORDS, (1, 9))
    cache = saved_states.new_cache(model)
    with pytest.raises(ValueError, match="layer 0 of the cache has seen no token"):
        saved_states.save_state(cache, path)
    model(ids, past_key_values=cache)
    saved_states.save_state(cache, path)
    redrawn = copy.deepcopy(model)
    redrawn.redraw_features()
    with pytest.raises(ValueError, match="initial_state must have been made by the same features"):
        redrawn(ids, past_key_values=saved_states.load_state(redrawn, path))
    with pytest.raises(ValueError, match="states of 2 layers, and PerformerForCausalLM has 1"):
        saved_states.load_state(causal(num_hidden_layers=1), path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        saved_states.load_state(model, path)
