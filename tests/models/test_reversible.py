"""Reversible layers: the gradients of the coupling, with nothing kept of any layer."""

from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerModel,
)
from performers.speed import peak_of_step

MIX = {
    "attention": ["exact", {"local": 1, "performer-positive": 2}] * 2,
    "attention_options": {"local": {"window_size": 3}},
}
# Hashes and clusters are decisions, which must come out the same when a layer is computed back.
KINDS = {
    "performer-relu": {},
    "reformer": {"attention": "reformer", "attention_options": {"chunk_size": 3}},
    "routing-transformer": {
        "attention": "routing-transformer",
        "attention_options": {"num_clusters": 3, "chunk_size": 2},
    },
    "mix": MIX,
}


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


# The type of the weights, what is around the forward pass, and whether around the backward pass.
PRECISIONS = {
    "float32": (torch.float32, nullcontext, False),
    "bfloat16": (torch.bfloat16, nullcontext, False),
    "autocast": (torch.float32, autocast, False),
    "autocast around both": (torch.float32, autocast, True),
}


@pytest.fixture
def reversible(tiny_model):
    """A reversible model in training, of four layers unless told otherwise."""

    def make(model_class=PerformerForMaskedLM, **options):
        options = {"num_hidden_layers": 4, "hidden_dropout_prob": 0.2, **options}
        return tiny_model(model_class, reversible=True, **options).train()

    return make


def coupled(model, tokens):
    """The last hidden state by the equations of the coupling, through autograd."""
    hidden = model.dropout(model.embed_tokens(tokens))
    rotation = model.positions.rotation(torch.arange(tokens.shape[1])[None])
    first = last = hidden.double()
    for layer in model.layers:
        read = layer.attention_norm(last.to(hidden.dtype))
        first = first + layer.dropout(layer.attention(read, rotation)[0])
        last = last + layer.dropout(layer.mlp(layer.mlp_norm(first.to(hidden.dtype))))
    return model.norm(((first + last) / 2).to(hidden.dtype))


def gradients(model, tokens, body=None):
    """The last hidden state, by `body` if given, and what collects its gradients."""
    model.zero_grad()
    torch.manual_seed(7)
    hidden = model(tokens).last_hidden_state if body is None else body(model, tokens)
    return hidden, lambda: _collected(model, hidden)


def _collected(model, hidden):
    hidden.float().square().sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_coupling(reversible, tokens, kind, precision):
    dtype, forward, is_around = PRECISIONS[precision]
    model = reversible(PerformerModel, **KINDS[kind]).to(dtype)
    with forward():
        expected, backward = gradients(model, tokens, coupled)
    expected_gradients = backward()
    with ExitStack() as stack:
        stack.enter_context(forward())
        out, backward = gradients(model, tokens)
        state = torch.get_rng_state()
        if not is_around:
            stack.close()
        found = backward()
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(out, expected)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: name + text)


def saved_bytes(model, tokens):
    """What autograd keeps for the backward pass, without the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(tokens, labels=tokens).loss
    assert loss.isfinite()
    return sum(sizes.values())


def test_what_32_layers_keep_is_what_2_keep(reversible, tiny_model, tokens):
    options = {"attention": "linear-transformer"}
    sizes = [saved_bytes(reversible(num_hidden_layers=n, **options), tokens) for n in (2, 32)]
    assert sizes[1] <= 1.3 * sizes[0]
    plain = [
        saved_bytes(tiny_model(PerformerForMaskedLM, num_hidden_layers=n, **options), tokens)
        for n in (2, 8)
    ]
    assert plain[1] > 3 * plain[0] > 3 * sizes[0]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets the peak")
def test_a_step_of_16_layers_needs_the_memory_of_a_step_of_2():
    """Resident memory, beyond weights and gradients: also what the allocator cannot use again."""

    def needed(layers):
        options = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
        options |= {"vocab_size": 31, "num_projections": 64, "num_hidden_layers": layers}
        model = PerformerForMaskedLM(PerformerConfig(**options))
        weights = sum(weight.nbytes for weight in model.parameters())
        peak = peak_of_step(options | {"reversible": True}, 4096, 1, torch.device("cpu"))
        return peak - 2 * weights

    assert needed(16) <= 1.3 * needed(2)


def test_each_weight_gets_its_gradient_once_and_a_frozen_one_none(reversible, tokens):
    model = reversible()
    layers, weights = model.performer.layers, dict(model.named_parameters())
    torch.manual_seed(7)
    model(tokens, labels=tokens).loss.backward()
    whole = {name: weight.grad.clone() for name, weight in weights.items()}
    model.zero_grad()
    layers[1].requires_grad_(False)
    model.performer.embed_tokens.requires_grad_(False)
    counts = dict.fromkeys(weights, 0)

    def count(name):
        def hook(weight):
            counts[name] += 1

        return hook

    for name, weight in weights.items():
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(count(name))
    torch.manual_seed(7)
    model(tokens, labels=tokens).loss.backward()
    for name, weight in weights.items():
        assert counts[name] == weight.requires_grad
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, whole[name])
        else:
            assert weight.grad is None


def test_a_graph_that_is_kept_gives_the_same_gradients_again(reversible, tokens):
    model = reversible()
    loss, weight = model(tokens, labels=tokens).loss, model.performer.layers[0].mlp.up_proj.weight
    once, again = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_weights_that_changed_before_the_backward_pass_are_refused(reversible, tokens):
    model = reversible()
    loss = model(tokens, labels=tokens).loss
    with torch.no_grad():
        model.performer.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_refused(reversible, tokens):
    model = reversible()
    loss, weight = model(tokens, labels=tokens).loss, model.performer.layers[0].mlp.up_proj.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_hidden_states_and_matrices_are_there_in_evaluation(reversible, tokens):
    model = reversible(PerformerModel).eval()
    out = model(tokens, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 5
    assert len(out.attentions) == 4
    torch.testing.assert_close(out.hidden_states[-1], model(tokens).last_hidden_state)
    shorter = reversible(PerformerModel, num_hidden_layers=1).eval()
    shorter.load_state_dict(model.state_dict(), strict=False)
    first = shorter.norm(out.hidden_states[1])
    torch.testing.assert_close(first, shorter(tokens).last_hidden_state)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "use_cache"])
def test_the_inside_of_the_layers_is_refused_in_training(reversible, tokens, asked):
    model = reversible(PerformerForCausalLM)
    with pytest.raises(ValueError, match=f"of their inside in training: got {asked}"):
        model(tokens, **{asked: True})
    with torch.no_grad():
        model(tokens, **{asked: True})


def test_gradient_checkpointing_and_norms_on_the_residual_path_are_refused(reversible):
    with pytest.raises(ValueError, match="leave gradient checkpointing out"):
        reversible().activation_checkpointing_enable()
    with pytest.raises(ValueError, match="got reversible=True, norm_first=False"):
        PerformerConfig(reversible=True, norm_first=False)
    with pytest.raises(TypeError, match="reversible must be true or false, got 'yes'"):
        PerformerConfig(reversible="yes")


def test_a_reversible_model_writes_the_same_with_and_without_a_cache(reversible, tokens):
    model = reversible(PerformerForCausalLM, num_hidden_layers=2).eval()
    options = {"do_sample": False, "max_new_tokens": 7, "attention_mask": torch.ones_like(tokens)}
    written = model.generate(tokens, **options)
    assert torch.equal(written, model.generate(tokens, **options, use_cache=False))


PROCESSES = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from performers.models import PerformerConfig, PerformerForMaskedLM

def model():
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=41, num_projections=17, hidden_dropout_prob=0.0, reversible=True,
    )
    return PerformerForMaskedLM(config).train()

def check(rank):
    dist.init_process_group("gloo", init_method={store!r}, rank=rank, world_size=2)
    tokens = torch.randint(31, (4, 11), generator=torch.Generator().manual_seed(5))
    alone, replicated = model(), model()
    alone(tokens, labels=tokens).loss.backward()
    counts = {{}}
    for name, weight in replicated.named_parameters():
        counts[name] = 0
        def hook(weight, name=name):
            counts[name] += 1
        weight.register_post_accumulate_grad_hook(hook)
    own = tokens[2 * rank : 2 * rank + 2]
    wrapped = DistributedDataParallel(replicated, find_unused_parameters={find_unused})
    for _ in range(2):
        replicated.zero_grad()
        wrapped(own, labels=own).loss.backward()
    assert set(counts.values()) == {{2}}, counts
    for ours, whole in zip(replicated.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-4, atol=1e-6)
    sharded = model()
    for layer in sharded.performer.layers:
        fully_shard(layer)
    try:
        fully_shard(sharded)(own)
    except NotImplementedError as error:
        assert "take DistributedDataParallel" in str(error)
    else:
        raise AssertionError("layers that FSDP has sharded must be refused")
    dist.destroy_process_group()

start_processes(check, nprocs=2, start_method="fork")
"""


@pytest.mark.slow
@pytest.mark.parametrize("find_unused", [False, True])
def test_two_processes_under_ddp_share_the_gradients_of_one(fresh_python, tmp_path, find_unused):
    fresh_python(PROCESSES.format(store=f"file://{tmp_path}/store", find_unused=find_unused))
