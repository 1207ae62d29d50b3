"""The cost of calls: seconds, measured in turn for all competitors, and memory, each in a process
of its own.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from performers.records.environment import PeakMemory

__all__ = [
    "OUT_OF_MEMORY",
    "PARTS",
    "TOO_SLOW",
    "exponential_rate",
    "interleaved",
    "limited_memory",
    "matmul_rate",
    "peak_bytes",
]

# What a result has instead of a number that could not be measured.
OUT_OF_MEMORY = "out of memory"
TOO_SLOW = "not tried"  # for it was too slow at a smaller size

# Of a step: the forward pass, and forward and backward together.
PARTS = ("forward", "forward_backward")

Measured = dict[str, float] | str


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Measured]:
    """Seconds of each call: median and quartiles of `repeats` rounds.

    Each round times every call, so what disturbs the machine for a while disturbs all alike. Right
    before it is timed, a call is made once untimed: it then finds memory and caches as it has left
    them, and does not pay for what the one before has left. On a CPU with one thread it is CPU
    time, which other processes disturb less than the time of day; with more threads it is the time
    of day, and on a GPU the time of its own events. A call that runs out of memory has that as its
    result, and the other calls continue.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    failed: set[str] = set()
    for _ in range(repeats):
        for name, call in calls.items():
            if name in failed:
                continue
            try:
                call()
                times[name].append(_seconds(call, device))
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                failed.add(name)
    return {
        name: OUT_OF_MEMORY if name in failed else _summary(measured)
        for name, measured in times.items()
    }


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def _summary(times: list[float]) -> dict[str, float]:
    shares = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}
    sample = torch.tensor(times, dtype=torch.float64)
    return {name: float(sample.quantile(share)) for name, share in shares.items()}


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of a large matrix product, which no attention can exceed."""
    size = 1024 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device).to(dtype)
    measured = interleaved({"product": lambda: a @ a}, 5, device)["product"]
    assert isinstance(measured, dict), "a machine that benchmarks has room for one matrix"
    return 2 * size**3 / measured["median"]


def exponential_rate(dtype: torch.dtype, device: torch.device) -> float | None:
    """Values of exp2 per second, of a tile that stays in the cache of a CPU.

    None on a GPU, where an operator by itself measures memory, not the unit that computes exp2.
    """
    if device.type != "cpu":
        return None
    size, rounds = 2**15, 64
    x = torch.randn(size).to(dtype)
    out = torch.empty_like(x)

    def tile() -> None:
        for _ in range(rounds):
            torch.exp2(x, out=out)

    measured = interleaved({"tile": tile}, 5, device)["tile"]
    assert isinstance(measured, dict), "a machine that benchmarks has room for one tile"
    return size * rounds / measured["median"]


def peak_bytes(step: Callable[..., object], *arguments: object, device: torch.device) -> int | str:
    """The most memory that a call needed beyond what was in use before it.

    On a CPU this is the high-water mark of the resident memory of a new process, so `step` and
    `arguments` must be picklable. On a GPU it is the most that its allocator gave out.
    """
    if device.type != "cpu":
        return _peak_bytes(device, step, *arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        try:
            return fresh.submit(_peak_bytes, device, step, *arguments).result()
        except BrokenProcessPool:  # the system kills a process when no memory is left
            return OUT_OF_MEMORY


def _peak_bytes(device: torch.device, step: Callable[..., object], *arguments: object) -> int | str:
    torch.set_num_threads(1)
    memory = PeakMemory()
    try:
        with limited_memory(device):
            step(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return OUT_OF_MEMORY
    peak = memory.measure()
    return "not known on this system" if peak is None else peak


@contextmanager
def limited_memory(device: torch.device) -> Iterator[None]:
    """Make an allocation fail if it needs more memory than is free now, before the system swaps.

    On a CPU; the allocator of a GPU fails by itself.
    """
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        yield
        return
    fields = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[5])
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    mine = pages * resource.getpagesize() + int(0.95 * free)
    limit = mine if hard == resource.RLIM_INFINITY else min(mine, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text: Any = str(error).lower()
    return "can't allocate memory" in text or "not enough memory" in text
