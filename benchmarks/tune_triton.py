"""Time the Triton kernels in tiles of many sizes on this machine's GPU, and print the best.

    python benchmarks/tune_triton.py --output benchmarks/triton-tiles.json

Attention is computed forward and backward, bidirectional and causal, with and without a near
field, with each candidate for the tiles of all kernels. What counts is the time that the GPU spends
in each kernel. The table of the library is `src/performers/backends/triton/config.py`: it is edited
by hand after reading the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from performers import KernelFeatures, SoftmaxFeatures, favor_attention
from performers.backends.triton import config
from performers.backends.triton.config import Config
from performers.records.environment import describe_environment

HEADS, LENGTH = 64, 4096
ROUNDS = 3
SOURCES = ("absorb", "scan", "read", "row_products", "query_gradient", "key_gradient")
CALLS: dict[str, dict[str, Any]] = {
    "bidirectional": {"is_causal": False},
    "causal": {"is_causal": True},
    "causal relu": {"is_causal": True, "relu": True},
    "near": {"is_causal": False, "window_size": 64},
    "causal near": {"is_causal": True, "window_size": 64},
}

Times = dict[str, float | str]


def candidates(operand: torch.dtype) -> list[Config]:
    rows = (64, 128) if operand == torch.bfloat16 else (16, 32, 64)
    features = (32, 64, 128) if operand == torch.bfloat16 else (16, 32, 64)
    stages = (1, 2, 3) if operand == torch.bfloat16 else (1, 2)
    return [Config.of(*sizes) for sizes in itertools.product(rows, features, (4, 8), stages)]


def calls(dtype: torch.dtype, dim: int) -> dict[str, Callable[[], object]]:
    """By name: a forward and a backward pass."""
    x = torch.randn(4, 1, HEADS, LENGTH, dim, device="cuda", dtype=dtype)
    query, key, value = (part.clone().requires_grad_() for part in x[:3].unbind())
    made: dict[str, Callable[[], object]] = {}
    for name, options in CALLS.items():
        rest = dict(options)
        make = KernelFeatures if rest.pop("relu", False) else SoftmaxFeatures
        phi = make(dim, 64 if "window_size" in options else 256).cuda()

        def both(phi: Any = phi, options: dict[str, Any] = rest) -> None:
            out = favor_attention(query, key, value, phi, backend="triton", **options)
            torch.autograd.grad(out, (query, key, value), x[3])

        made[name] = both
    return made


def measure(dtype_name: str, dim: int, tile: Config, skip: dict[str, str] | None = None) -> Times:
    """Milliseconds of each kernel of each call, "call/kernel"; where it fails, "call": why.

    `skip`: None only compiles and runs each once; else the calls that failed then.
    """
    dtype = getattr(torch, dtype_name)
    operand = config.OPERANDS[dtype].dtype
    config.CONFIGS[operand, dim] = tile
    found: Times = {}
    for name, call in calls(dtype, dim).items():
        if skip and name in skip:
            continue
        try:
            for _ in range(ROUNDS):
                call()
            torch.cuda.synchronize()
            if skip is not None:
                found |= {f"{name}/{kernel}": time for kernel, time in kernel_times(call).items()}
        except Exception as error:  # noqa: BLE001  # a tile that the compiler or the GPU refuses
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            if "illegal" in str(error):
                break
    return found


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kernel = event.key if event.key in SOURCES else "torch"
        times[kernel] += event.self_device_time_total / 1e3 / ROUNDS
    return dict(times)


class Workers:
    """Processes that measure tiles; new ones come where a tile has broken the GPU's context."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool = self._made()

    def _made(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.count, mp_context=get_context("spawn"))

    def measure(self, name: str, dim: int, tile: Config, skip: dict[str, str]) -> Times:
        found = self.pool.submit(measure, name, dim, tile, skip).result()
        if any("illegal" in str(value) for value in found.values()):
            self.pool.shutdown()
            self.pool = self._made()
        return found


def compiled(name: str, dim: int, tiles: list[Config]) -> list[Times]:
    """Why calls fail, for each tile. Fills Triton's cache on disk, each tile in a process."""
    context, workers = get_context("spawn"), os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(measure, [name] * len(tiles), [dim] * len(tiles), tiles))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the Triton kernels in tiles of many sizes.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128])
    arguments = parser.parse_args()
    table = []
    workers = Workers(1)
    for name, dim in itertools.product(arguments.dtypes, arguments.dims):
        tiles = candidates(config.OPERANDS[getattr(torch, name)].dtype)
        failures = compiled(name, dim, tiles)
        mine: list[dict[str, Any]] = []
        for tile, failed in zip(tiles, failures, strict=True):
            size = {"rows": tile.rows, **tile.read._asdict()}
            times: Times = {}
            if not any("illegal" in str(why) for why in failed.values()):
                times = workers.measure(name, dim, tile, failed)  # type: ignore[arg-type]
            mine.append({"dtype": name, "dim": dim, "tile": size, "ms": times, "failed": failed})
        table += mine
        for call in sorted({call for one in mine for call in one["ms"]}):
            ranked = sorted((one for one in mine if call in one["ms"]), key=lambda x: x["ms"][call])
            for one in ranked[:3]:
                print(f"{name} {dim} {call}: {one['ms'][call]:.3f} {list(one['tile'].values())}")
        result = {"environment": describe_environment(), "tiles": table}
        arguments.output.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
