"""The plans of all layouts beside each other, and as text: one column per layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from performers.planning.layouts import LAYOUTS, largest_batch, plan
from performers.planning.workload import Workload
from performers.records import aligned

__all__ = ["bytes_of", "plan_layouts", "plan_words"]

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


def plan_layouts(workload: Workload, devices: int, memory: int) -> dict[str, Any]:
    """The plan of every layout for devices with so many bytes, and why a layout is left out.

    Raises ValueError where not even the first layout, that of every run, can be planned.
    """
    layouts: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in LAYOUTS if devices > 1 else ["data"]:
        try:
            found = plan(workload, name, devices)
        except ValueError as error:
            if not layouts:
                raise
            refused[name] = str(error)
        else:
            layouts[name] = {
                **asdict(found),
                "fits": found.peak <= memory,
                "largest_batch": largest_batch(workload, name, devices, memory),
            }
    return {
        "weights": workload.weights,
        "layers": workload.config.num_hidden_layers,
        "batch": workload.batch,
        "length": workload.length,
        "accumulation": workload.accumulation,
        "devices": devices,
        "memory": memory,
        "layouts": layouts,
        "refused": refused,
    }


def plan_words(record: Mapping[str, Any]) -> str:
    """What `plan_layouts` found, as a table with a column for each layout."""
    devices, layouts = record["devices"], record["layouts"]
    batch = "sequence" if record["batch"] == 1 else "sequences"
    again = f", {record['accumulation']} times a step" if record["accumulation"] > 1 else ""
    lines = [
        f"{record['weights']:,} weights in {record['layers']} layers. A device computes "
        f"{record['batch']} {batch} of {record['length']:,} tokens at a time{again}.",
        "",
    ]

    def row(title: str, name: str, words: Callable[[Any], str] = _bytes) -> list[str]:
        return [title, *(words(layout[name]) for layout in layouts.values())]

    rows = [
        [f"one of {devices} devices" if devices > 1 else "one device", *layouts],
        row("weights", "weights"),
        row("gradients", "gradients"),
        row("optimizer", "optimizer"),
        row("activations", "activations"),
        row("expected peak", "peak"),
        row("reached in", "moment", str),
        row(f"fits {_bytes(record['memory'])}", "fits", lambda fits: "yes" if fits else "no"),
        row("largest batch that fits", "largest_batch", "{:,}".format),
        row("operations of a step", "operations", "{:.3g}".format),
        row("sent in a step", "sent"),
    ]
    reasons = [f"Not {name}: {reason}" for name, reason in record["refused"].items()]
    return "\n".join([*lines, *aligned(rows), *([""] if reasons else []), *reasons])


def _bytes(size: int | float) -> str:
    unit = [name for name in UNITS if UNITS[name] <= max(size, 1)][-1]
    return f"{size / UNITS[unit]:.4g} {unit}"
