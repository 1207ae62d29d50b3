"""Figure 20: Performers of 1 to 20 layers, and attention alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from performers import speed
from performers.models.config import SIZES
from performers.reproduction import kept, resumable_folder
from performers.speed.timing import TOO_SLOW
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

PARTS = ("forward", "forward_backward")
ALONE = {
    "exact": ("exact", COLORS[1]),
    "plain": ("FAVOR+", COLORS[0]),
    "identity": ("X (OPT)", BASELINE_COLOR),
}


@dataclass(frozen=True)
class Config:
    """Regular Performers, bidirectional; and attention with 8 heads of dim 64 on its own.

    What takes more than `patience` seconds is not tried at greater lengths.
    """

    layers: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 20)
    lengths: tuple[int, ...] = tuple(2**power for power in range(9, 16))
    attention_lengths: tuple[int, ...] = tuple(2**power for power in range(8, 19))
    size: str = "regular"
    num_projections: int = 256
    repeats: int = 3
    patience: float = 60.0
    device: str = "cpu"
    seed: int = 0


PAPER = replace(Config(), device="cuda" if torch.cuda.is_available() else "cpu")
REDUCED = replace(
    Config(),
    layers=(1, 5, 10, 20),
    lengths=(512, 1024, 2048, 4096),
    attention_lengths=tuple(2**power for power in range(8, 15)),
    repeats=1,
    patience=5.0,
)
SMOKE = replace(
    REDUCED,
    layers=(1, 2),
    lengths=(16, 32),
    attention_lengths=(16, 32),
    size="small",
    num_projections=16,
)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    plan = speed.Plan(
        lengths=config.attention_lengths,
        memory_lengths=(),
        contexts=(),
        model_lengths=(),
        settings=("plain",),
        dtypes=("float32",),
        num_projections=config.num_projections,
        repeats=config.repeats,
        patience=config.patience,
        device=config.device,
        seed=config.seed,
    )
    layers = []
    with resumable_folder("figure-20", config) as folder:
        attention = kept(folder / "attention.json", partial(speed.run, plan, report))["time"]
        for count in config.layers:
            slow = False
            for length in config.lengths:
                report(f"{count} layers, L = {length}")
                seconds: dict[str, Any] = dict.fromkeys(PARTS, TOO_SLOW)
                if not slow:
                    measure = partial(_seconds_of, config, count, length)
                    seconds = kept(folder / f"{count}-{length}.json", measure)
                both = seconds["forward_backward"]
                slow = isinstance(both, str) or both["median"] > config.patience
                layers.append({"layers": count, "length": length, "seconds": seconds})
    return {"attention": attention, "layers": layers}


def _seconds_of(config: Config, num_layers: int, length: int) -> dict[str, Any]:
    """Seconds of a step of a Performer with so many layers."""
    model = {
        **SIZES[config.size],
        "attention": "performer-positive",
        "num_hidden_layers": num_layers,
        "vocab_size": 256,
        "num_projections": config.num_projections,
        "max_position_embeddings": length,
        "hidden_dropout_prob": 0.0,
        "seed": config.seed,
    }
    device = torch.device(config.device)
    return speed.seconds_of_step({"FAVOR+": model}, length, 1, config.repeats, device)["FAVOR+"]


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 7.2), layout="constrained")
        grid = drawn.subplots(2, 2)
        for axes, part in zip(grid[0], PARTS, strict=True):
            for index, count in enumerate(config["layers"]):
                rows = [row for row in results["layers"] if row["layers"] == count]
                shade = 0.3 + 0.7 * (index + 1) / len(config["layers"])
                points = [(row["length"], row["seconds"][part]) for row in rows]
                _line(axes, points, _layers(count), color=COLORS[0], alpha=shade)
            axes.set_title(f"{config['size']} Performer, {part.replace('_', ' and ')}")
        for axes, part in zip(grid[1], PARTS, strict=True):
            for causal, line in ((False, "-"), (True, "--")):
                rows = [row for row in results["attention"] if row["causal"] == causal]
                for name, (label, color) in ALONE.items():
                    points = [(row["length"], row["seconds"][name][part]) for row in rows]
                    mode = ", causal" if causal else ""
                    _line(axes, points, label + mode, color=color, linestyle=line)
            axes.set_title(f"attention alone, {part.replace('_', ' and ')}")
        for axes in grid.flat:
            axes.set_xscale("log", base=2)
            axes.set(yscale="log", xlabel="length L", ylabel="seconds")
        grid[0][0].legend()
        grid[1][0].legend()
    return drawn


def _line(axes: Any, points: list[tuple[int, Any]], label: str, **style: Any) -> None:
    """A line through the medians; what could not be measured ends it."""
    known = [(length, x["median"]) for length, x in points if not isinstance(x, str)]
    axes.plot(*zip(*known, strict=True), marker="o", markersize=3.5, label=label, **style)


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    lengths = config["lengths"]
    lines = [
        f"| s forward and backward | {' | '.join(f'L = {length}' for length in lengths)} |",
        f"|---|{'---|' * len(lengths)}",
    ]
    for count in config["layers"]:
        rows = [row for row in results["layers"] if row["layers"] == count]
        lines.append(f"| {_layers(count)} | {' | '.join(_cell(row['seconds']) for row in rows)} |")
    lines += [
        "",
        "| attention alone, s forward and backward | exact | FAVOR+ | FAVOR+ ÷ exact |",
        "|---|---|---|---|",
    ]
    for row in results["attention"]:
        exact, ours = (row["seconds"][name] for name in ("exact", "plain"))
        ratio = ""
        if not isinstance(exact["forward_backward"], str):
            ours_median = ours["forward_backward"]["median"]
            ratio = f"{ours_median / exact['forward_backward']['median']:.2f}"
        mode = "causal" if row["causal"] else "bidirectional"
        lines.append(f"| {mode}, L = {row['length']} | {_cell(exact)} | {_cell(ours)} | {ratio} |")
    return "\n".join(lines)


def _cell(seconds: dict[str, Any]) -> str:
    both = seconds["forward_backward"]
    return both if isinstance(both, str) else f"{both['median']:.3g}"


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
