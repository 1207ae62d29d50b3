"""What a plan expects is what torch's memory profiler measures, on models of a few megabytes."""

import gc
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM, parallelize
from performers.backends import kernel_chunks, kernel_tiles
from performers.backends.buffers import Buffers
from performers.functional import favor_attention
from performers.nn.mechanisms import Favor
from performers.planning import Workload, largest_batch, plan, workload_of
from performers.planning.tables import bytes_of
from performers.train import load_config

SIZES = {
    "vocab_size": 31,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 127,
    "num_projections": 37,
}
BROAD = {"hidden_size": 256, "intermediate_size": 1021}  # most of it weights

pytestmark = pytest.mark.usefixtures("like_an_accelerator")


@pytest.fixture
def like_an_accelerator(monkeypatch):
    """Tiles, their memory and the masks of dropout as torch has them on a GPU."""
    monkeypatch.setattr(Buffers, "take", lambda self, name, shape, like: like.new_empty(shape))
    monkeypatch.setattr(kernel_tiles, "_sizes", lambda values, _: (len(values), 512))
    sizes = kernel_chunks.sizes
    monkeypatch.setattr(
        kernel_chunks, "sizes", lambda length, m, _: sizes(length, m, torch.device("meta"))
    )
    monkeypatch.setattr(
        F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0]
    )


def built(is_causal=False, **changes):
    torch.manual_seed(0)
    kind = PerformerForCausalLM if is_causal else PerformerForMaskedLM
    model = kind(PerformerConfig(**{**SIZES, **changes})).train()
    for module in model.modules():
        if isinstance(module, Favor):
            module.attend = partial(favor_attention, backend="chunked")
    return model


def measured(wrap, model, workload):
    """The most bytes of a training step, with AdamW as accelerators run it."""
    tokens = torch.randint(31, (workload.batch, workload.length))
    if workload.is_checkpointed:
        model.activation_checkpointing_enable()
    before = held(model)
    made, _, whole = traced(partial(wrap, model))
    # What wrapping has reserved beside weights, the buckets of DistributedDataParallel.
    reserved = made if isinstance(whole, DistributedDataParallel) else 0
    optimizer = torch.optim.AdamW(whole.parameters(), foreach=True)

    def step():
        for last in [*[False] * (workload.accumulation - 1), True]:
            if hasattr(whole, "set_requires_gradient_sync"):
                whole.set_requires_gradient_sync(last)
            with torch.autocast("cpu", torch.bfloat16, enabled=workload.is_half):
                loss = whole(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # for what is made once
    gc.collect()
    local = held(model)
    state = 2 * (local - sum(x.nbytes for x in model.buffers()))
    assert local <= before
    return local + state + reserved + traced(step)[1]


def held(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(getattr(x, "_local_tensor", x).nbytes for x in tensors)


def traced(call):
    """Bytes that a call leaves, the most that it had at a time, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most, result


def check(expected, found):
    assert 0.85 <= expected / found <= 1.15, f"expected {expected:,}, measured {found:,} bytes"


# One device: what it trains, and how.
RUNS = {
    "kernel": ({"attention": "performer-relu"}, {}),
    "kernel, half precision": ({"attention": "performer-relu"}, {"is_half": True}),
    "kernel, checkpointed": ({"attention": "performer-relu"}, {"is_checkpointed": True}),
    "scan": ({"is_causal": True, "attention": "performer-positive"}, {}),
    "near field": ({"attention": "performer-positive", "window_size": 61}, {}),
    "exact": ({"attention": "exact", "hidden_act": "relu"}, {"is_half": True}),
}
MORE = {
    "two sweeps": ({"attention": "performer-positive"}, {}),
    "sharp": ({"attention": "performer-sharp"}, {}),
    "hyperbolic": ({"attention": "performer-hyperbolic"}, {}),
    "causal kernel": ({"is_causal": True, "attention": "performer-elu+1"}, {}),
    "causal near field": (
        {"is_causal": True, "attention": "performer-positive", "window_size": 61}, {}
    ),
    "scan, half precision, shared keys": (
        {"is_causal": True, "attention": "performer-positive", "num_key_value_heads": 2},
        {"is_half": True},
    ),
    "scan, checkpointed": (
        {"is_causal": True, "attention": "performer-positive"}, {"is_checkpointed": True}
    ),
    "mixed": ({"attention": {"performer-relu": 2, "exact": 2}}, {}),
    "none": ({"attention": "identity", "position": "sinusoidal"}, {}),
    "silu, no dropout": ({"hidden_act": "silu", "hidden_dropout_prob": 0.0}, {}),
    "no rotation": ({"position": "learned", "max_position_embeddings": 1021}, {}),
    "weights": ({**BROAD}, {"length": 61}),
    "sums of gradients": ({**BROAD}, {"length": 61, "accumulation": 2}),
}  # fmt: skip


def workload(model, batch=1, length=1021, **changes):
    return Workload(model, batch, length, **changes)


def check_run(model_changes, changes):
    model = built(**model_changes)
    work = workload(model, **changes)
    check(plan(work, "data", devices=1).peak, measured(lambda model: model, model, work))


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_step_is_within_15_percent_of_the_measured_one(name):
    check_run(*RUNS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_so_is_that_of_other_models(name):
    check_run(*MORE[name])


@contextmanager
def pretended_ranks(number):
    """A group of this process and others that are not there: what they send is not defined."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield init_device_mesh("cpu", (number,))
    finally:
        dist.destroy_process_group()


def sharded(model, mesh):
    """As accelerate does it: a group per layer, and one of what is outside."""
    for layer in model.performer.layers:
        fully_shard(layer, mesh=mesh)
    tail = [model.performer.norm, model.performer.embed_tokens, model.lm_head]
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(
    ("model_changes", "changes"),
    [
        (BROAD, {"length": 127}),
        pytest.param({}, {}, marks=pytest.mark.slow),
        pytest.param(BROAD, {"length": 251, "is_checkpointed": True}, marks=pytest.mark.slow),
        pytest.param(BROAD, {"length": 127, "accumulation": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_sharded_training_is_within_15_percent(model_changes, changes):
    model = built(**model_changes)
    work = workload(model, **changes)
    expected = plan(work, "sharded", devices=4).peak
    with pretended_ranks(4) as mesh:
        check(expected, measured(partial(sharded, mesh=mesh), model, work))


def test_the_peak_of_data_parallel_training_is_within_15_percent():
    def run():
        model = built(**BROAD)
        work = workload(model, length=127)
        return plan(work, "data", devices=2).peak, measured(DistributedDataParallel, model, work)

    # DistributedDataParallel of one process has the buckets of many.
    check(*on_ranks(1, run)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "length", "is_causal", "changes"),
    [
        (2, 2039, False, {"attention": "performer-relu"}),
        (2, 2039, True, {"attention": "performer-positive"}),
        (3, 307, True, {"attention": "performer-positive", "num_projections": 509}),
    ],
)
def test_the_peak_over_split_sequences_is_within_15_percent(ranks, length, is_causal, changes):
    def run():
        model = built(is_causal, **changes)
        for module in model.modules():
            if isinstance(module, Favor):
                del module.attend
        work = workload(built(is_causal, **changes), length=length)

        def split(model):
            return DistributedDataParallel(parallelize(model, dist.group.WORLD))

        return plan(work, "sequence", ranks).peak, measured(split, model, work)

    check(*on_ranks(ranks, run)[0])


def test_the_weights_are_counted_exactly():
    model = built(attention="performer-relu")
    of_layers = sum(x.numel() for x in model.performer.layers.parameters())
    work = workload(model)
    assert work.weights == sum(x.numel() for x in model.parameters())
    assert sum(work.weights_of_layers()) == of_layers
    buffers = sum(x.nbytes for x in model.buffers())
    assert plan(work, "data", devices=1).weights == 4 * work.weights + buffers


@pytest.mark.parametrize("is_checkpointed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_operations_are_within_15_percent_of_those_counted(is_checkpointed):
    model = built(attention="performer-positive", hidden_dropout_prob=0.0)
    work = workload(model, length=1024, is_checkpointed=is_checkpointed)
    if is_checkpointed:
        model.activation_checkpointing_enable()
    tokens = torch.randint(31, (work.batch, work.length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    check(plan(work, "data", devices=1).operations, counter.get_total_flops())


def test_the_largest_batch_is_the_last_that_fits():
    work = workload(built(attention="performer-relu"))
    memory = 2**26
    most = largest_batch(work, "sharded", 2, memory)
    peaks = [plan(workload(work.model, n), "sharded", 2).peak for n in (most, most + 1)]
    assert peaks[0] <= memory < peaks[1]
    assert largest_batch(work, "sharded", 2, 1000) == 0


def test_what_ranks_send_over_split_sequences_does_not_grow_with_the_length():
    model = built(is_causal=True, attention="performer-positive")
    sent = [plan(workload(model, length=n), "sequence", 4).sent for n in (1021, 10_007)]
    assert sent[0] == sent[1]


def test_a_plan_reads_the_config_of_a_run():
    changes = ["trainer.bf16=true", "trainer.gradient_accumulation_steps=3", "data.length=127"]
    work = workload_of(load_config("demo", [*changes, "trainer.per_device_train_batch_size=5"]))
    assert (work.batch, work.length, work.accumulation, work.is_half) == (5, 127, 3, True)
    assert not work.is_checkpointed
    assert workload_of(load_config("demo", ["trainer.gradient_checkpointing=true"])).is_checkpointed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["trainer.optim=adagrad"], "got trainer.optim=adagrad"),
        (["model.attention=local", "model.window_size=null"], "got LocalAttention"),
        (["model.reversible=true"], "reversible=True"),
    ],
)
def test_what_no_formula_is_about_is_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(workload_of(load_config("demo", changes)), "data", devices=1)


def test_what_is_not_planned_over_split_sequences_is_refused_by_name():
    with pytest.raises(ValueError, match="got Exact"):
        plan(workload(built(attention="exact")), "sequence", devices=2)
    windowed = built(attention="performer-positive", window_size=61)
    with pytest.raises(ValueError, match="no formulas for near fields over"):
        plan(workload(windowed), "sequence", devices=2)
    with pytest.raises(ValueError, match="sequence of 3 tokens cannot be split over 4 devices"):
        plan(workload(built(), length=3), "sequence", devices=4)


@pytest.mark.parametrize("size", ["80", "80GB", "GiB", "-1GiB", "0GiB"])
def test_a_size_without_a_unit_of_memory_is_refused(size):
    with pytest.raises(ValueError, match="as in 80GiB"):
        bytes_of(size)


def test_sizes_of_memory_are_powers_of_two():
    assert [bytes_of(size) for size in ("1B", "1.5 KiB", "2GiB")] == [1, 1536, 2**31]
