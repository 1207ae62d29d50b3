"""One attention layer, in every setting of `SETTINGS`, compared with the alternatives.

Nothing is timed before every setting has matched its definition in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from performers.checks import check_choice
from performers.functional import softmax_attention
from performers.records import TimeLeft, describe_environment
from performers.speed.competitors import Mechanism, favor, mechanisms, versions
from performers.speed.model import seconds_of_step
from performers.speed.operations import Operations
from performers.speed.plan import Plan
from performers.speed.settings import SETTINGS
from performers.speed.summary import decoding_line, memory_line, model_line, time_lines
from performers.speed.timing import (
    OUT_OF_MEMORY,
    PARTS,
    TOO_SLOW,
    exponential_rate,
    interleaved,
    limited_memory,
    matmul_rate,
    peak_bytes,
)
from performers.state import LinearState
from performers.theory.cost import exact_operations

__all__ = ["run"]

DECODED = ("plain", "near-field")
BURST = 64  # tokens decoded in succession, so that a near field comes to the end of a block

# A whole model, and what is put into it.
MODEL = {
    "vocab_size": 32,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "hidden_dropout_prob": 0.0,
    "num_projections": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "identity": {"attention": "identity"},
    "exact": {"attention": "exact"},
    "relu": {"attention": "performer-relu"},
    "plain": {"attention": "performer-positive"},
    "near-field": {
        "attention": "performer-positive", "window_size": 64, "num_projections": 64
    },
}  # fmt: skip


def run(
    plan: Plan,
    report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    begun: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All measurements of a plan, as JSON can hold them. `report` gets lines of progress.

    `keep` gets the result after each measurement. `begun`, what it got last from a run that was
    interrupted, is completed.

    Raises ValueError, before anything runs, for unknown settings, dtypes and devices, and if
    `begun` was measured by another plan, or with other versions or hardware.
    """
    _check(plan)
    torch.manual_seed(plan.seed)
    device, result = torch.device(plan.device), _begin(plan, begun)

    def missing(part: str, **key: Any) -> bool:
        return not any(row.items() >= key.items() for row in result[part])

    left, before, planned = TimeLeft(), _tokens(result), _tokens_planned(plan)

    def add(part: str, row: dict[str, Any], line: str) -> None:
        result[part].append(row)
        keep(result)
        done = _tokens(result)
        report(f"{line}\n{done / planned:.0%} done, {left((done - before) / (planned - before))}")

    peers = {name: list(SETTINGS[name].peers) for name in plan.settings}
    with limited_memory(device):
        for dtype in plan.dtypes:
            if dtype not in result["rates"]:
                kind = getattr(torch, dtype)
                rates = matmul_rate(kind, device), exponential_rate(kind, device)
                result["rates"][dtype] = dict(zip(("product", "exponential"), rates, strict=True))
            for causal in (False, True):
                for name in plan.settings:
                    if missing("correctness", setting=name, dtype=dtype, causal=causal):
                        result["correctness"].append(_correctness_row(plan, name, dtype, causal))
                made: dict[str, Mechanism] = {}
                for length in plan.lengths:
                    if missing("time", dtype=dtype, causal=causal, length=length):
                        made = made or {
                            name: make() for name, make in mechanisms(plan, causal).items()
                        }
                        slow = _slow(plan, result["time"], dtype, causal)
                        row = _time_row(plan, made, dtype, causal, length, slow)
                        row["floor_seconds"] = _floors(
                            plan, causal, length, *result["rates"][dtype].values()
                        )
                        add("time", row, time_lines(row, peers))
    for causal in (False, True):
        slow = _slow(plan, result["time"], plan.dtypes[-1], causal)
        for length in plan.memory_lengths:
            if missing("memory", causal=causal, length=length):
                row = _memory_row(plan, causal, length, slow)
                add("memory", row, memory_line(row))
    for causal in (False, True):
        for length in plan.model_lengths:
            if missing("models", causal=causal, length=length):
                row = _model_row(plan, causal, length)
                add("models", row, model_line(row))
    with limited_memory(device):
        for context in plan.contexts:
            if missing("decoding", context=context):
                row = _decoding_row(plan, context)
                add("decoding", row, decoding_line(row))
    return result


def _check(plan: Plan) -> None:
    if torch.device(plan.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda" needs a GPU that torch can use; this torch sees none.')
    for name in plan.settings:
        check_choice("setting", name, SETTINGS)
    for name in plan.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtype must be a float type of torch, got {name!r}.")


def _begin(plan: Plan, begun: dict[str, Any] | None) -> dict[str, Any]:
    """A result without measurements, or `begun`, if it is of this plan, version and hardware."""
    about = {
        "plan": asdict(plan),
        "settings": {name: _description(plan, name) for name in plan.settings},
        "model": {"shared": MODEL, "attention": MODELS},
        "environment": describe_environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "peers": versions(),
    }
    about = json.loads(json.dumps(about))  # as a file holds it, in which a tuple is a list
    parts: dict[str, list[Any]] = {
        "correctness": [], "time": [], "memory": [], "models": [], "decoding": []
    }  # fmt: skip
    result: dict[str, Any] = begun or {**about, "rates": {}, **parts}
    changed = [name for name, value in about.items() if result.get(name) != value]
    if changed:
        raise ValueError(
            "what is completed must be of this plan and this machine, and was begun with another "
            f"{' and another '.join(changed)}. Repeat the command that began it, or begin anew."
        )
    return result


READ = 1 / 16  # of the time that a token takes: contexts are read once, lengths timed both ways


def _tokens(result: Mapping[str, Any]) -> float:
    """Tokens of all sequences that were timed: what is measured takes about as long."""
    parts = ("time", "memory", "models")
    timed = sum(row["length"] for part in parts for row in result[part])
    return timed + READ * sum(row["context"] for row in result["decoding"])


def _tokens_planned(plan: Plan) -> float:
    by_dtype = len(plan.dtypes) * sum(plan.lengths)
    twice = by_dtype + sum(plan.memory_lengths) + sum(plan.model_lengths)
    return 2 * twice + READ * sum(plan.contexts)


def _slow(plan: Plan, rows: list[dict[str, Any]], dtype: str, causal: bool) -> dict[str, int]:
    """By the mechanisms that are not tried any longer: the length at which one was too slow."""
    slow: dict[str, int] = {}
    for row in rows:
        if (row["dtype"], row["causal"]) == (dtype, causal):
            for name, parts in row["seconds"].items():
                both = parts["forward_backward"]
                if isinstance(both, str) or both["median"] > plan.patience:
                    slow.setdefault(name, row["length"])
    return slow


def _description(plan: Plan, name: str) -> dict[str, Any]:
    setting = SETTINGS[name]
    return {
        "num_projections": plan.layer(setting, False).num_projections if setting.far else 0,
        "window_size": setting.window_size,
        "peers": setting.peers,
    }


def _inputs(plan: Plan, length: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (3, plan.batch, plan.heads, length, plan.dim)
    inputs = torch.randn(shape, device=plan.device).to(dtype)
    return [x.clone().requires_grad_() for x in inputs]


def _step(attend: Mechanism, inputs: Sequence[Tensor]) -> None:
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)


def _correctness_row(plan: Plan, name: str, dtype_name: str, causal: bool) -> dict[str, Any]:
    """The error of a setting against its definition. Raises RuntimeError if it is large.

    The definition takes a step of Python per query, so the length is small. A sequence with a near
    field has three and a half blocks, so that some keys are far and one block is not full.
    """
    dtype, small = getattr(torch, dtype_name), replace(plan, batch=1, heads=1)
    window_size = SETTINGS[name].window_size
    longest = 300 if window_size is None else 7 * window_size // 2
    length = min(max(plan.lengths), longest)
    query, key, value = (x.detach() for x in _inputs(small, length, dtype))
    attend = favor(small, name, causal)
    got = attend(query, key, value).double()
    want = attend(query.double(), key.double(), value.double(), backend="reference")
    error = float((got - want).norm() / want.norm())
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not error < limit:
        raise RuntimeError(
            f"{name} must be within {limit} of its definition before it is timed, but it is off by "
            f"{error:.1e} at length {length}, {dtype}, causal={causal}. This is a bug: please "
            "report it with the output of `performers info`."
        )
    return {
        "setting": name,
        "dtype": dtype_name,
        "causal": causal,
        "length": length,
        "relative_error": error,
    }


def _time_row(
    plan: Plan,
    made: dict[str, Mechanism],
    dtype: str,
    causal: bool,
    length: int,
    slow: dict[str, int],
) -> dict[str, Any]:
    """Seconds of the forward pass, and of forward and backward, of what is not in `slow`."""
    device = torch.device(plan.device)
    inputs = _inputs(plan, length, getattr(torch, dtype))
    calls: dict[str, Callable[[], object]] = {}
    for name, attend in made.items():
        if name not in slow:
            calls[f"{name}/forward"] = partial(torch.no_grad()(attend), *inputs)
            calls[f"{name}/forward_backward"] = partial(_step, attend, inputs)
    measured = interleaved(calls, plan.repeats, device)
    seconds: dict[str, Any] = {
        name: {part: measured.get(f"{name}/{part}", TOO_SLOW) for part in PARTS} for name in made
    }
    return {"dtype": dtype, "causal": causal, "length": length, "seconds": seconds}


def _floors(
    plan: Plan, causal: bool, length: int, product_rate: float, exponential_rate: float | None
) -> dict[str, dict[str, float]]:
    """Seconds of the operations alone that exact attention and each setting must do."""
    pairs = length**2 / (2 if causal else 1)
    needed = {"exact": Operations(exact_operations(length, plan.dim, causal), pairs)}
    for name in plan.settings:
        setting = SETTINGS[name]
        needed[name] = setting.operations(plan.layer(setting, causal), length)
    count = plan.batch * plan.heads
    return {
        name: {
            "forward": one.times(count).seconds(product_rate, exponential_rate),
            "forward_backward": one.with_backward()
            .times(count)
            .seconds(product_rate, exponential_rate),
        }
        for name, one in needed.items()
    }


def training_step(plan: Plan, name: str, causal: bool, length: int) -> None:
    """What the memory of one row is measured on."""
    _step(mechanisms(plan, causal)[name](), _inputs(plan, length, torch.float32))


def _memory_row(plan: Plan, causal: bool, length: int, slow: dict[str, int]) -> dict[str, Any]:
    device = torch.device(plan.device)
    peaks: dict[str, int | str] = {}
    for name in mechanisms(plan, causal):
        peaks[name] = TOO_SLOW
        if length <= slow.get(name, length):
            peaks[name] = peak_bytes(training_step, plan, name, causal, length, device=device)
    return {"causal": causal, "length": length, "peak_bytes": peaks}


def _model_row(plan: Plan, causal: bool, length: int) -> dict[str, Any]:
    """Seconds of a step of masked, or causal, language models that differ in attention alone."""
    shared = {**MODEL, "max_position_embeddings": length, "is_decoder": causal, "seed": plan.seed}
    configs = {name: {**shared, **attention} for name, attention in MODELS.items()}
    seconds = seconds_of_step(configs, length, plan.batch, plan.repeats, torch.device(plan.device))
    return {"causal": causal, "length": length, "seconds": seconds}


def _decoding_row(plan: Plan, context: int) -> dict[str, Any]:
    """Seconds of one more token after `context` tokens that were all read, and bytes of what is
    kept.

    Each timing covers several tokens in succession, as in generation.
    """
    device = torch.device(plan.device)
    shape = (plan.batch, plan.heads, 1, plan.dim)
    token = torch.randn(3, *shape, device=device).unbind()
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, Any] = {}
    for name in DECODED:
        if name not in plan.settings:
            continue
        attend = partial(favor(plan, name, causal=True), return_state=True)
        state = _state_after(plan, attend, context)
        calls[name] = partial(_decode, attend, token, state)
        sizes[name] = sum(part.nbytes for part in state.parts().values())
    sizes["exact"] = 2 * context * plan.batch * plan.heads * plan.dim * 4
    try:
        keys, values = torch.randn(2, plan.batch, plan.heads, context, plan.dim, device=device)
    except RuntimeError:
        sizes["exact"] = OUT_OF_MEMORY
    else:

        def exact() -> None:
            for _ in range(BURST):
                softmax_attention(token[0], keys, values)

        calls["exact"] = torch.no_grad()(exact)
    seconds: dict[str, Any] = dict.fromkeys(sizes, OUT_OF_MEMORY)
    for name, measured in interleaved(calls, plan.repeats, device).items():
        if not isinstance(measured, str):
            seconds[name] = {share: value / BURST for share, value in measured.items()}
    return {"context": context, "seconds": seconds, "bytes": sizes}


@torch.no_grad()
def _state_after(plan: Plan, attend: Callable[..., Any], context: int) -> LinearState:
    state: LinearState | None = None
    for length in _pieces(context, 16384):
        shape = (3, plan.batch, plan.heads, length, plan.dim)
        _, state = attend(*torch.randn(shape, device=plan.device).unbind(), initial_state=state)
    assert state is not None, "a context has at least one token"
    return state


@torch.no_grad()
def _decode(attend: Callable[..., Any], token: Sequence[Tensor], state: LinearState) -> None:
    for _ in range(BURST):
        _, state = attend(*token, initial_state=state)


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
