"""Time and memory of one attention layer of every mechanism, beside what its paper promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from performers.models import MECHANISMS, PerformerConfig
from performers.records import markdown_table
from performers.records.environment import PeakMemory
from performers.reproduction import kept, resumable_folder
from performers.speed.timing import TOO_SLOW, interleaved, limited_memory
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

# What a paper chooses by the length.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "sparse-transformer": lambda length: {"stride": math.isqrt(length)},
    "routing-transformer": lambda length: {"num_clusters": math.isqrt(length)},
}
MODES = {False: "bidirectional", True: "causal"}

# FAVOR+ is blue, what is quadratic dark, blocks and windows orange and green, clusters purple.
DARK = "#111827"
LINES = {
    "exact": (DARK, "-"),
    "synthesizer": (DARK, "--"),
    "identity": (BASELINE_COLOR, ":"),
    "performer-positive": (COLORS[0], "-"),
    "performer-relu": (COLORS[0], "--"),
    "performer-sharp": (COLORS[0], "-."),
    "linear-transformer": (COLORS[0], ":"),
    "local": (COLORS[2], "-"),
    "longformer": (COLORS[2], "--"),
    "sparse-transformer": (COLORS[2], ":"),
    "big-bird": (COLORS[1], "-"),
    "sinkhorn": (COLORS[1], "--"),
    "linformer": (COLORS[1], ":"),
    "reformer": (COLORS[3], "-"),
    "routing-transformer": (COLORS[3], "--"),
    "clustered-favor": (COLORS[3], ":"),
}


@dataclass(frozen=True)
class Config:
    """After a step of more than `patience` seconds a mechanism is not tried at greater lengths, nor
    where a quadratic one would need more than `room` bytes there. `weighs`: whether memory is
    measured as well.
    """

    lengths: tuple[int, ...] = tuple(2**power for power in range(10, 15))
    weighs: bool = True
    heads: int = 8
    dim: int = 64
    num_projections: int = 256
    repeats: int = 3
    patience: float = 60.0
    room: int = 32 * 2**30
    device: str = "cpu"
    seed: int = 0


PAPER = replace(Config(), device="cuda" if torch.cuda.is_available() else "cpu")
REDUCED = replace(Config(), heads=1, repeats=1, patience=2.0, room=2 * 2**30)
SMOKE = replace(REDUCED, lengths=(16, 32), dim=8, num_projections=16, repeats=1, weighs=False)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    rows = []
    with (
        resumable_folder("mechanisms", config) as folder,
        limited_memory(torch.device(config.device)),
    ):
        for name, mechanism in MECHANISMS.items():
            for causal, mode in MODES.items():
                if causal and mechanism.memory is None:
                    continue
                report(f"{name}, {mode}")
                measure = partial(_row, config, name, causal)
                rows.append(kept(folder / f"{name}-{causal}.json", measure))
    return {"rows": rows}


def _row(config: Config, name: str, causal: bool) -> dict[str, Any]:
    row = {"mechanism": name, "promised": MECHANISMS[name].cost, "causal": causal}
    return {**row, "steps": list(_measured(config, name, causal))}


def _measured(config: Config, name: str, causal: bool) -> Iterator[dict[str, Any]]:
    """The cost of a step at each length."""
    is_tried = True
    for length in config.lengths:
        if not is_tried:
            yield {"length": length, "seconds": TOO_SLOW, "bytes": TOO_SLOW}
            continue
        step = partial(_step, *_layer(config, name, length), causal)
        seconds = interleaved({name: step}, config.repeats, torch.device(config.device))[name]
        size: int | str | None = seconds if isinstance(seconds, str) else None
        if config.weighs and size is None:
            memory = PeakMemory()
            step()
            size = memory.measure()
        yield {"length": length, "seconds": seconds, "bytes": size}
        is_tried = (
            not isinstance(seconds, str)
            and seconds["median"] <= config.patience
            and 4 * (size or 0) <= config.room
        )


def _layer(config: Config, name: str, length: int) -> tuple[nn.Module, list[Tensor]]:
    """A mechanism for sequences of this length, and queries, keys and values of one."""
    fields = PerformerConfig(
        attention=name,
        attention_options=OPTIONS.get(name, lambda length: {})(length),
        num_attention_heads=config.heads,
        hidden_size=config.heads * config.dim,
        num_projections=config.num_projections,
        max_position_embeddings=length,
        seed=config.seed,
    )
    with warnings.catch_warnings():
        # Features that can be negative are measured, too: here nobody reads the outputs.
        warnings.simplefilter("ignore", UserWarning)
        layer = MECHANISMS[name].build(fields, 0).to(config.device)
    shape = (3, 1, config.heads, length, config.dim)
    inputs = torch.randn(shape, device=config.device).unbind()
    return layer, [x.clone().requires_grad_() for x in inputs]


def _step(layer: nn.Module, inputs: list[Tensor], causal: bool) -> None:
    out = layer(*inputs, is_causal=causal)
    learned = [*inputs, *layer.parameters()]
    torch.autograd.grad(out, learned, torch.ones_like(out), allow_unused=True)


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    panels = {"seconds": _times, "MiB beyond the inputs": _sizes}
    if not config["weighs"]:
        panels = {"seconds": _times}
    with rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 1.4 + 3.6 * len(panels)), layout="constrained")
        grid = drawn.subplots(len(panels), 2, sharex=True, sharey="row", squeeze=False)
        for across, (unit, points) in zip(grid, panels.items(), strict=True):
            for axes, (causal, mode) in zip(across, MODES.items(), strict=True):
                rows = {row["mechanism"]: row for row in results["rows"] if row["causal"] == causal}
                for name, (color, line) in LINES.items():
                    if name in rows and (measured := points(rows[name]["steps"])):
                        style = {"color": color, "marker": "o", "markersize": 3, "label": name}
                        axes.plot(*zip(*measured, strict=True), line, **style)
                axes.set_xscale("log", base=2)
                axes.set(yscale="log", title=f"{mode}, forward and backward")
                axes.label_outer()
            across[0].set_ylabel(unit)
        for axes in grid[-1]:
            axes.set_xlabel("length L")
        handles, names = grid[0][0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower center", ncols=4)
    return drawn


def _times(steps: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(step["length"], step["seconds"]["median"]) for step in _known(steps)]


def _sizes(steps: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Those that are not 0, which has no place on the axis."""
    return [
        (step["length"], step["bytes"] / 2**20)
        for step in steps
        if isinstance(step["bytes"], int) and step["bytes"]
    ]


def _known(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [step for step in steps if not isinstance(step["seconds"], str)]


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    longest = config["lengths"][-1]
    tables = []
    for causal, mode in MODES.items():
        lines = [
            [
                f"{mode}, s forward and backward",
                "promised",
                *(f"L = {length:,}" for length in config["lengths"]),
                "grows",
                f"memory at L = {longest:,}",
            ]
        ]
        for row in results["rows"]:
            if row["causal"] == causal:
                times = [_seconds(step["seconds"]) for step in row["steps"]]
                cells = [*times, _growth(row["steps"]), _mebibytes(row["steps"][-1]["bytes"])]
                lines.append([row["mechanism"], row["promised"], *cells])
        tables.append(markdown_table(lines))
    return "\n\n".join(tables)


def _seconds(seconds: dict[str, float] | str) -> str:
    return seconds if isinstance(seconds, str) else f"{seconds['median']:.3g}"


def _growth(steps: list[dict[str, Any]]) -> str:
    """The exponent of the length between the two greatest lengths that were measured."""
    known = _known(steps)
    if len(known) < 2:
        return ""
    before, last = known[-2:]
    times = last["seconds"]["median"] / before["seconds"]["median"]
    return f"L^{math.log(times) / math.log(last['length'] / before['length']):.1f}"


def _mebibytes(size: int | str | None) -> str:
    if size is None:
        return "not measured"
    return size if isinstance(size, str) else f"{size / 2**20:,.0f} MiB"
