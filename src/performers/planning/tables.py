"""A plan as text: one column per layout."""

from __future__ import annotations

import re

from performers.planning.layouts import LAYOUTS, Plan, largest_batch, plan
from performers.planning.workload import Workload
from performers.records import aligned

__all__ = ["bytes_of", "plan_words"]

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_of(size: str) -> int:
    """Bytes of a size in words.

    Raises ValueError for anything else than a number above 0 and a unit.

    >>> bytes_of("80GiB")
    85899345920
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(\w+)", size.strip())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise ValueError(
            f"a size of memory must be a number above 0 and one of {', '.join(UNITS)}, as in "
            f"80GiB: got {size!r}."
        )
    return int(float(found[1]) * UNITS[found[2]])


def plan_words(workload: Workload, devices: int, memory: int) -> str:
    """The plan of every layout for devices with so many bytes, and why a layout is left out.

    Raises ValueError where not even the first layout, that of every run, can be planned.
    """
    plans: dict[str, Plan] = {}
    reasons = []
    for name in LAYOUTS if devices > 1 else ["data"]:
        try:
            plans[name] = plan(workload, name, devices)
        except ValueError as error:
            if not plans:
                raise
            reasons.append(f"Not {name}: {error}")
    is_many = devices > 1
    config = workload.config
    batch = "sequence" if workload.batch == 1 else "sequences"
    again = f", {workload.accumulation} times a step" if workload.accumulation > 1 else ""
    lines = [
        f"{workload.weights:,} weights in {config.num_hidden_layers} layers. A device computes "
        f"{workload.batch} {batch} of {workload.length:,} tokens at a time{again}.",
        "",
    ]
    rows = [
        [f"one of {devices} devices" if is_many else "one device", *plans],
        ["weights", *(_bytes(p.weights) for p in plans.values())],
        ["gradients", *(_bytes(p.gradients) for p in plans.values())],
        ["optimizer", *(_bytes(p.optimizer) for p in plans.values())],
        ["activations", *(_bytes(p.activations) for p in plans.values())],
        ["expected peak", *(_bytes(p.peak) for p in plans.values())],
        ["reached in", *(p.moment for p in plans.values())],
        [f"fits {_bytes(memory)}", *("yes" if p.peak <= memory else "no" for p in plans.values())],
        [
            "largest batch that fits",
            *(f"{largest_batch(workload, name, devices, memory):,}" for name in plans),
        ],
        ["operations of a step", *(f"{p.operations:.3g}" for p in plans.values())],
        ["sent in a step", *(_bytes(p.sent) for p in plans.values())],
    ]
    lines += aligned(rows)
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def _bytes(size: int | float) -> str:
    unit = [name for name in UNITS if UNITS[name] <= max(size, 1)][-1]
    return f"{size / UNITS[unit]:.4g} {unit}"
