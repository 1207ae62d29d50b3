"""One attention layer against what a person would pick instead.

    exact               torch's scaled_dot_product_attention (flash attention on a GPU)
    identity            returns V: the floor that the paper calls X
    performer           favor_attention with positive features

and, where they are installed, against

    performer-pytorch
    flash-linear-attention   its causal kernels, given the features of FAVOR+; on a GPU only

Nothing is timed before FAVOR+ has matched its own definition in float64.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from io import StringIO
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performers.baselines import Identity
from performers.benchmark.timing import (
    OUT_OF_MEMORY,
    TOO_SLOW,
    interleaved,
    limited_memory,
    matmul_rate,
    peak_bytes,
)
from performers.functional import favor_attention, softmax_attention
from performers.nn import SoftmaxFeatures
from performers.train.environment import describe_environment
from performers.typing import LinearState

__all__ = ["PEER", "Plan", "crossover", "run"]

PEER = "performer-pytorch"
KERNELS = "flash-linear-attention"
MODULES = {PEER: "performer_pytorch", KERNELS: "fla"}
BURST = 20  # tokens decoded in succession
Mechanism = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """What to measure. `memory_lengths` and `contexts` may be empty, and their part is left out."""

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    memory_lengths: tuple[int, ...] = (1024, 4096, 32768)
    contexts: tuple[int, ...] = (1024, 16384, 131072, 1048576)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 1
    heads: int = 8
    dim: int = 64
    num_projections: int = 256
    repeats: int = 5
    # Seconds of a step after which a mechanism is not tried at a greater length.
    patience: float = 10.0
    device: str = "cpu"
    seed: int = 0

    def quick(self) -> Plan:
        """A minute or so, to see where this machine stands."""
        return replace(
            self,
            lengths=(256, 512, 1024, 2048, 4096),
            memory_lengths=(4096,),
            contexts=(1024, 16384),
            dtypes=("float32",),
            repeats=3,
        )


def run(plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """All measurements of a plan, as JSON can hold them. `report` takes lines on how far it is.

    Raises ValueError for dtypes and devices that are not there, before anything runs.
    """
    device = torch.device(plan.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda" needs a GPU that torch can use; this torch sees none.')
    for name in plan.dtypes:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"dtype must be a float type of torch, got {name!r}.")
    torch.manual_seed(plan.seed)
    result: dict[str, Any] = {
        "plan": asdict(plan),
        "environment": describe_environment(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "peers": {
            name: metadata.version(name) if _is_installed(name) else None for name in MODULES
        },
        "time": [],
        "memory": [],
        "decoding": [],
    }
    slow: dict[bool, dict[str, int]] = {}
    with limited_memory(device):
        for name in plan.dtypes:
            rate = matmul_rate(getattr(torch, name), device)
            for causal in (False, True):
                mechanisms = _mechanisms(plan, causal)
                slow[causal] = {}
                for length in plan.lengths:
                    row = _time_row(plan, mechanisms, name, causal, length, slow[causal])
                    flops = 8 * length * plan.num_projections * plan.dim * plan.heads * plan.batch
                    row["floor_seconds"] = flops / rate
                    result["time"].append(row)
                    report(time_line(row))
    for causal in (False, True):
        for length in plan.memory_lengths:
            result["memory"].append(_memory_row(plan, causal, length, slow[causal]))
            report(memory_line(result["memory"][-1]))
    with limited_memory(device):
        for context in plan.contexts:
            result["decoding"].append(_decoding_row(plan, context))
            report(decoding_line(result["decoding"][-1]))
    return result


def _mechanisms(plan: Plan, causal: bool) -> dict[str, Mechanism]:
    """What is compared, by name."""
    device = torch.device(plan.device)
    table: dict[str, Mechanism] = {
        "exact": partial(scaled_dot_product_attention, is_causal=causal),
        "identity": partial(Identity(), is_causal=causal),
        "performer": partial(favor_attention, phi=_features(plan), is_causal=causal),
    }
    if _is_installed(PEER):
        from performer_pytorch import FastAttention

        with redirect_stdout(StringIO()):  # it says each time that it found no CUDA code
            peer = FastAttention(plan.dim, plan.num_projections, causal=causal)
        table[PEER] = peer.to(device)
    if _is_installed(KERNELS) and causal and device.type == "cuda":
        table[KERNELS] = partial(_flash_linear_attention, _features(plan))
    return table


def _flash_linear_attention(
    phi: SoftmaxFeatures, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Causal FAVOR+ by kernels that are given its features: [batch, length, heads, m]."""
    from fla.ops.linear_attn import chunk_linear_attn

    root = math.sqrt(phi.default_scale)
    features = phi.query_features(query.float() * root), phi.key_features(key.float() * root)
    query, key = (part.dense().to(value.dtype).transpose(1, 2) for part in features)
    out, _ = chunk_linear_attn(query, key, value.transpose(1, 2), scale=1.0, normalize=True)
    return out.transpose(1, 2)


def _features(plan: Plan) -> SoftmaxFeatures:
    return SoftmaxFeatures(plan.dim, plan.num_projections).to(torch.device(plan.device))


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def _inputs(plan: Plan, length: int, dtype: torch.dtype) -> list[Tensor]:
    shape = (3, plan.batch, plan.heads, length, plan.dim)
    inputs = torch.randn(shape, device=plan.device).to(dtype)
    return [x.clone().requires_grad_() for x in inputs]


def _step(attend: Mechanism, inputs: Sequence[Tensor]) -> None:
    out = attend(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)


def _time_row(
    plan: Plan,
    mechanisms: dict[str, Mechanism],
    dtype_name: str,
    causal: bool,
    length: int,
    slow: dict[str, int],
) -> dict[str, Any]:
    """Seconds of the forward pass and of forward and backward together.

    `slow`: the lengths from which on mechanisms are not tried. It grows.
    """
    dtype, device = getattr(torch, dtype_name), torch.device(plan.device)
    error = _relative_error(plan, min(length, 1024), dtype, causal)
    inputs = _inputs(plan, length, dtype)
    calls: dict[str, Callable[[], object]] = {}
    for name, attend in mechanisms.items():
        if name not in slow:
            calls[f"{name}/forward"] = partial(torch.no_grad()(attend), *inputs)
            calls[f"{name}/forward_backward"] = partial(_step, attend, inputs)
    measured = interleaved(calls, plan.repeats, device)
    seconds: dict[str, Any] = {
        name: {part: measured.get(f"{name}/{part}", TOO_SLOW) for part in PARTS}
        for name in mechanisms
    }
    for name, parts in seconds.items():
        both = parts["forward_backward"]
        if isinstance(both, str) or both["median"] > plan.patience:
            slow.setdefault(name, length)
    return {
        "dtype": dtype_name,
        "causal": causal,
        "length": length,
        "relative_error": error,
        "seconds": seconds,
    }


PARTS = ("forward", "forward_backward")


def _relative_error(plan: Plan, length: int, dtype: torch.dtype, causal: bool) -> float:
    """That of `performer` against its definition. Raises RuntimeError if it is large."""
    small = replace(plan, batch=1, heads=1)
    query, key, value = (x.detach() for x in _inputs(small, length, dtype))
    phi = _features(plan)
    got = favor_attention(query, key, value, phi, is_causal=causal).double()
    query, key, value = query.double(), key.double(), value.double()
    want = favor_attention(query, key, value, phi, is_causal=causal, backend="reference")
    error = float((got - want).norm() / want.norm())
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    if not error < limit:
        raise RuntimeError(
            f"FAVOR+ must be within {limit} of its definition before it is timed, but it is off by "
            f"{error:.1e} at length {length}, {dtype}, causal={causal}. This is a bug: please "
            "report it with the output of `performers info`."
        )
    return error


def training_step(plan: Plan, name: str, causal: bool, length: int) -> None:
    """What the memory of one row is measured on."""
    _step(_mechanisms(plan, causal)[name], _inputs(plan, length, torch.float32))


def _memory_row(plan: Plan, causal: bool, length: int, slow: dict[str, int]) -> dict[str, Any]:
    device = torch.device(plan.device)
    peaks: dict[str, int | str] = {}
    for name in _mechanisms(plan, causal):
        peaks[name] = TOO_SLOW
        if length <= slow.get(name, length):
            peaks[name] = peak_bytes(training_step, plan, name, causal, length, device=device)
    return {"causal": causal, "length": length, "peak_bytes": peaks}


def _decoding_row(plan: Plan, context: int) -> dict[str, Any]:
    """Seconds and bytes of one more token after `context` of them, every one of which was read.

    A turn of the clock is a burst of tokens, as in generation.
    """
    device, phi = torch.device(plan.device), _features(plan)
    shape = (3, plan.batch, plan.heads, 1, plan.dim)
    query, key, value = torch.randn(shape, device=device).unbind()
    state = LinearState.empty(plan.batch, plan.heads, phi.num_features, plan.dim, device=device)
    for length in _pieces(context, 16384):
        shape = (2, plan.batch, plan.heads, length, plan.dim)
        keys, values = torch.randn(shape, device=device).unbind()
        _, state = favor_attention(query, keys, values, phi, initial_state=state, return_state=True)

    def performer() -> None:
        after = state
        for _ in range(BURST):
            _, after = favor_attention(
                query, key, value, phi, is_causal=True, initial_state=after, return_state=True
            )

    def exact() -> None:
        for _ in range(BURST):
            softmax_attention(query, keys, values)

    calls: dict[str, Callable[[], object]] = {"performer": torch.no_grad()(performer)}
    sizes: dict[str, Any] = {
        "performer": sum(x.nbytes for x in state.parts().values()),
        "exact": 2 * context * plan.batch * plan.heads * plan.dim * 4,
    }
    try:
        keys, values = torch.randn(2, plan.batch, plan.heads, context, plan.dim, device=device)
    except RuntimeError:
        sizes["exact"] = OUT_OF_MEMORY
    else:
        calls["exact"] = torch.no_grad()(exact)
    seconds: dict[str, Any] = {"performer": OUT_OF_MEMORY, "exact": OUT_OF_MEMORY}
    for name, measured in interleaved(calls, plan.repeats, device).items():
        if not isinstance(measured, str):
            seconds[name] = {share: value / BURST for share, value in measured.items()}
    return {"context": context, "seconds": seconds, "bytes": sizes}


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def crossover(rows: list[dict[str, Any]], dtype: str, causal: bool, part: str) -> float | None:
    """The length from which the Performer is the faster one, between those that were measured.

    None if exact attention still wins at the greatest length; the least length if it never does.
    """
    points = []
    for row in rows:
        exact, ours = (row["seconds"][name][part] for name in ("exact", "performer"))
        if (row["dtype"], row["causal"]) == (dtype, causal) and isinstance(ours, dict):
            ratio = math.log(ours["median"] / exact["median"]) if isinstance(exact, dict) else -1.0
            points.append((math.log(row["length"]), ratio))
    if not points or points[-1][1] >= 0:
        return None
    last_loss = max((i for i, (_, ratio) in enumerate(points) if ratio >= 0), default=None)
    if last_loss is None:
        return math.exp(points[0][0])
    (left, worse), (right, better) = points[last_loss : last_loss + 2]
    return math.exp(left + (right - left) * worse / (worse - better))


def time_line(row: dict[str, Any]) -> str:
    """One row for a person: times of the Performer as parts of the others'."""
    cells = [f"{row['dtype']:9} {'causal' if row['causal'] else 'both':6} L = {row['length']:7,d}"]
    for part in PARTS:
        ours = row["seconds"]["performer"][part]
        if isinstance(ours, str):
            cells.append(f"{part.replace('_', ' + ')}: {ours}")
            continue
        cells.append(f"{part.replace('_', ' + ')} {ours['median'] * 1e3:9.2f} ms")
        for name in ("exact", *MODULES):
            theirs = row["seconds"].get(name, {}).get(part)
            if isinstance(theirs, dict):
                cells.append(f"{ours['median'] / theirs['median']:6.3f} × {name}")
    forward = row["seconds"]["performer"]["forward"]
    if isinstance(forward, dict):
        cells.append(f"{row['floor_seconds'] / forward['median']:4.0%} of the floor")
    return "  ".join(cells)


def memory_line(row: dict[str, Any]) -> str:
    """Peak memory of a training step, for a person."""
    sizes = ", ".join(
        f"{name} {size / 2**20:,.0f} MiB" if isinstance(size, int) else f"{name} {size}"
        for name, size in row["peak_bytes"].items()
    )
    return f"memory    {'causal' if row['causal'] else 'both':6} L = {row['length']:7,d}  {sizes}"


def decoding_line(row: dict[str, Any]) -> str:
    """Tokens per second after a context, for a person."""
    cells = []
    for name, seconds in row["seconds"].items():
        size = row["bytes"][name]
        if isinstance(seconds, str):
            cells.append(f"{name} {seconds}")
        else:
            cells.append(f"{name} {1 / seconds['median']:,.0f} tokens/s, {size / 2**20:,.1f} MiB")
    return f"decoding after {row['context']:9,d} tokens: {'; '.join(cells)}"
