"""The machine and the versions of a run, and the memory that it took."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "PeakMemory",
    "describe_environment",
    "memory_of_machine",
    "peak_of_tensors",
    "resident_bytes",
]

PACKAGES = ("performers", "torch", "transformers", "accelerate", "safetensors", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, as they go into a report."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


class PeakMemory:
    """The most memory in use since this was made, beyond what was in use then, in bytes.

    On an accelerator this is what torch allocated. On a CPU it is the resident memory of the
    process, whose high-water mark Linux resets on request; elsewhere it is unknown (None).
    """

    def __init__(self) -> None:
        gc.collect()
        self.before = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            # What an earlier model has freed may still be held by the allocator: give it back.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident_bytes()

    def measure(self) -> int | None:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.before
        if Path("/proc/self/clear_refs").exists():
            return _process_bytes("VmHWM") - self.before
        return None


def peak_of_tensors(call: Callable[[], object]) -> int:
    """The most bytes of tensors that a call on a CPU held at a time, beside those before it.

    That is what the allocator of an accelerator would have given out, and the same in every run.
    The process takes more: between tensors of many sizes that come and go the C library is left
    with gaps. A call takes a little longer than otherwise, because PyTorch's profiler watches it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says on every call that it has begun
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    # Only what this call made: the trace's total goes on from that of an earlier trace, and what is
    # freed may lie where something of that one did.
    held: dict[str, int] = {}
    now = most = 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        with path.open(encoding="utf-8") as lines:  # there may be millions
            for line in lines:
                found = re.search(r'"Total Allocated": .*"Bytes": (-?\d+), .*"Addr": (\d+)', line)
                if found is None:
                    continue
                size, address = int(found[1]), found[2]
                now -= held.pop(address, 0)
                if size > 0:
                    held[address] = size
                    now += size
                most = max(most, now)
    return most


def memory_of_machine() -> int | None:
    """The memory of the machine in bytes, where the system says it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def resident_bytes() -> int:
    """The memory that this process has in use now, on Linux, its libraries included."""
    return _process_bytes("VmRSS")


def _process_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found, f"Linux says {field} of a process"
    return int(found[1]) * 1024
