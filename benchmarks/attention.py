"""Time one attention layer against what a user would pick instead, after checking that it is right.

    python benchmarks/attention.py                 # L from 1024 to 16384, float32 and bfloat16
    python benchmarks/attention.py --lengths 1024 2048 --repeats 3 --output runs/attention.json

Everything runs in one process on one thread, mechanisms in turn, and what is compared is CPU time
(time.process_time), which a busy machine disturbs less than wall time. Each figure is the median
over the repeats, with the quartiles beside it. Nothing is timed before FAVOR+ has matched its own
definition in float64.

Mechanisms: `exact` is torch's scaled_dot_product_attention; `identity` returns V, the floor that
the paper calls X; `performer` is favor_attention; `performer-pytorch` runs where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performers.functional import favor_attention
from performers.nn import SoftmaxFeatures

HEADS, DIM, NUM_PROJECTIONS = 8, 64, 256
Mechanism = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def mechanisms(length: int) -> dict[str, Mechanism]:
    """What is compared at this length, by name."""
    phi = SoftmaxFeatures(DIM, NUM_PROJECTIONS)
    table: dict[str, Mechanism] = {
        "exact": lambda q, k, v, causal: scaled_dot_product_attention(q, k, v, is_causal=causal),
        "identity": lambda q, k, v, causal: v.clone(),
        "performer": lambda q, k, v, causal: favor_attention(q, k, v, phi, is_causal=causal),
    }
    if importlib.util.find_spec("performer_pytorch"):
        from performer_pytorch import FastAttention

        peers = {
            causal: FastAttention(DIM, NUM_PROJECTIONS, causal=causal, no_projection=False)
            for causal in (False, True)
        }
        table["performer-pytorch"] = lambda q, k, v, causal: peers[causal](q, k, v)
    return table


def check(length: int, dtype: torch.dtype, causal: bool) -> float:
    """The relative error of `performer` against its definition; an assertion if it is large."""
    phi = SoftmaxFeatures(DIM, NUM_PROJECTIONS)
    length = min(length, 1024)
    query, key, value = torch.randn(3, 1, 1, length, DIM, dtype=dtype).unbind()
    got = favor_attention(query, key, value, phi, is_causal=causal).double()
    wide = (x.double() for x in (query, key, value))
    want = favor_attention(*wide, phi, is_causal=causal, backend="reference")
    error = float((got - want).norm() / want.norm())
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    assert error < limit, f"performer is off by {error:.1e} at {length}, {dtype}, causal={causal}"
    return error


def measure(length: int, dtype: torch.dtype, causal: bool, repeats: int) -> dict[str, dict]:
    """CPU seconds of the forward pass and of forward and backward together, mechanisms in turn."""
    inputs = [
        x.clone().requires_grad_() for x in torch.randn(3, 1, HEADS, length, DIM, dtype=dtype)
    ]
    table = mechanisms(length)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "forward_backward": []} for name in table
    }
    for repeat in range(repeats + 1):
        for name, attend in table.items():
            with torch.no_grad():
                start = time.process_time()
                attend(*inputs, causal)
                forward = time.process_time() - start
            start = time.process_time()
            out = attend(*inputs, causal)
            torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)
            both = time.process_time() - start
            if repeat:  # the first round warms up
                seconds[name]["forward"].append(forward)
                seconds[name]["forward_backward"].append(both)
    return {
        name: {part: summary(times) for part, times in parts.items()}
        for name, parts in seconds.items()
    }


def summary(times: list[float]) -> dict[str, float]:
    quartiles = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return dict(
        zip(("lower_quartile", "median", "upper_quartile"), quartiles.tolist(), strict=True)
    )


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP per CPU second of a large matrix product, the rate that the floor of 8·L·m·d uses."""
    a = torch.randn(2048, 2048, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.process_time()
        a @ a
        times.append(time.process_time() - start)
    return 2 * 2048**3 / sorted(times)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "attention.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in options.dtypes:
        dtype = getattr(torch, name)
        rate = matmul_rate(dtype)
        for causal in (False, True):
            for length in options.lengths:
                row = {"dtype": name, "causal": causal, "length": length}
                row["relative_error"] = check(length, dtype, causal)
                row["seconds"] = measure(length, dtype, causal, options.repeats)
                row["floor_seconds"] = 8 * length * NUM_PROJECTIONS * DIM * HEADS / rate
                rows.append(row)
                print(line(row), flush=True)
    result = {
        "batch": 1,
        "heads": HEADS,
        "dim": DIM,
        "num_projections": NUM_PROJECTIONS,
        "threads": 1,
        "clock": "process_time",
        "repeats": options.repeats,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


def line(row: dict) -> str:
    """One row for a person: times of the Performer as parts of exact attention's."""
    seconds = row["seconds"]
    parts = [f"{row['dtype']:9} {'causal' if row['causal'] else 'both':6} L={row['length']:6d}"]
    for part in ("forward", "forward_backward"):
        exact = seconds["exact"][part]["median"]
        ours = seconds["performer"][part]["median"]
        parts.append(f"{part} {ours * 1e3:7.1f} ms = {ours / exact:5.3f} × exact")
        if "performer-pytorch" in seconds:
            parts.append(f"{ours / seconds['performer-pytorch'][part]['median']:5.3f} × peer")
    forward = seconds["performer"]["forward"]["median"]
    parts.append(f"{row['floor_seconds'] / forward:4.0%} of the floor")
    return "   ".join(parts)


if __name__ == "__main__":
    main()
