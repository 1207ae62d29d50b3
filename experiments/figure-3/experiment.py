"""Figures 3 and 21: a training step of whole models against the length, and X, the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from performers.models.config import SIZES
from performers.reproduction import kept, resumable_folder
from performers.speed import peak_of_step, seconds_of_step
from performers.speed.timing import TOO_SLOW
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

MECHANISMS = {
    "exact": ("Transformer", COLORS[1], "-"),
    "performer-positive": ("Performer", COLORS[0], "-"),
    "identity": ("X (OPT)", BASELINE_COLOR, "--"),
}


@dataclass(frozen=True)
class Config:
    """Bidirectional models of the paper's two sizes, vocabulary 256.

    A mechanism whose step takes more than `patience` seconds is not tried at greater lengths.
    """

    sizes: tuple[str, ...] = ("regular", "small")
    lengths: tuple[int, ...] = tuple(2**power for power in range(9, 19))
    memory_lengths: tuple[int, ...] = (4096, 32768)
    batch: int = 1
    vocab_size: int = 256
    num_projections: int = 256
    repeats: int = 3
    patience: float = 120.0
    device: str = "cpu"
    seed: int = 0


PAPER = replace(Config(), device="cuda" if torch.cuda.is_available() else "cpu")
REDUCED = replace(
    Config(), lengths=tuple(2**power for power in range(9, 14)), repeats=1, patience=8.0
)
SMOKE = replace(REDUCED, sizes=("small",), lengths=(16, 32), memory_lengths=(), num_projections=16)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    times, memory = [], []
    with resumable_folder("figure-3", config) as folder:
        for size in config.sizes:
            slow: set[str] = set()
            for length in config.lengths:
                report(f"{size}, L = {length}")
                names = tuple(name for name in MECHANISMS if name not in slow)
                seconds = kept(
                    folder / f"{size}-{length}.json",
                    partial(_seconds_of, config, size, length, names, device),
                )
                for name, parts in seconds.items():
                    both = parts["forward_backward"]
                    if isinstance(both, str) or both["median"] > config.patience:
                        slow.add(name)
                times.append({"size": size, "length": length, "seconds": seconds})
            for length in config.memory_lengths:
                report(f"{size}, memory at L = {length}")
                peaks = kept(
                    folder / f"{size}-{length}-memory.json",
                    partial(_peaks, config, size, length, device),
                )
                memory.append({"size": size, "length": length, "bytes": peaks})
    return {"times": times, "memory": memory}


def _seconds_of(
    config: Config, size: str, length: int, names: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Seconds of a step of these mechanisms; the others are too slow."""
    models = {name: _model(config, size, length, name) for name in names}
    found: dict[str, Any] = {
        name: {"forward": TOO_SLOW, "forward_backward": TOO_SLOW} for name in MECHANISMS
    }
    if names:
        measured = seconds_of_step(models, length, config.batch, config.repeats, device)
        for name, parts in measured.items():
            found[name] |= parts
    return found


def _peaks(config: Config, size: str, length: int, device: torch.device) -> dict[str, Any]:
    """Peak memory of a step of each mechanism."""
    return {
        name: peak_of_step(_model(config, size, length, name), length, config.batch, device)
        for name in MECHANISMS
        # Exact attention needs little memory here, but minutes at these lengths.
        if name != "exact" or length <= 4096
    }


def _model(config: Config, size: str, length: int, mechanism: str) -> dict[str, Any]:
    return {
        **SIZES[size],
        "attention": mechanism,
        "vocab_size": config.vocab_size,
        "num_projections": config.num_projections,
        "max_position_embeddings": length,
        "hidden_dropout_prob": 0.0,
        "seed": config.seed,
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with rc_context(STYLE):
        drawn = Figure(figsize=(8.4, 3.6 * len(config["sizes"])), layout="constrained")
        grid = drawn.subplots(len(config["sizes"]), 2, squeeze=False)
        for row, size in zip(grid, config["sizes"], strict=True):
            for axes, part in zip(row, ("forward", "backward"), strict=True):
                for name, (label, color, line) in MECHANISMS.items():
                    points = [
                        (entry["length"], seconds)
                        for entry in results["times"]
                        if entry["size"] == size
                        and (seconds := _seconds(entry["seconds"][name], part)) is not None
                    ]
                    axes.plot(
                        *zip(*points, strict=True), line, color=color, marker="o", markersize=3.5,
                        label=label,
                    )  # fmt: skip
                axes.set_xscale("log", base=2)
                axes.set(
                    yscale="log", xlabel="length L", ylabel="seconds", title=f"{size}, {part} pass"
                )
        grid[0][0].legend()
    return drawn


def _seconds(parts: Mapping[str, Any], part: str) -> float | None:
    """The median of a pass; of the backward pass what both take less what the forward pass does."""
    forward, both = parts["forward"], parts["forward_backward"]
    if isinstance(forward, str) or isinstance(both, str):
        return None
    median: float = forward["median"]
    return median if part == "forward" else float(both["median"] - median)


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    lines = []
    for size in config["sizes"]:
        heads = " | ".join(label for label, _, _ in MECHANISMS.values())
        lines += [
            f"| {size}, s forward + backward | {heads} | Performer ÷ Transformer | Performer ÷ X |",
            f"|---|{'---|' * (len(MECHANISMS) + 2)}",
        ]
        for entry in results["times"]:
            if entry["size"] == size:
                both = {n: p["forward_backward"] for n, p in entry["seconds"].items()}
                cells = [x if isinstance(x, str) else f"{x['median']:.3g}" for x in both.values()]
                ours = both["performer-positive"]
                for other in ("exact", "identity"):
                    known = not isinstance(ours, str) and not isinstance(both[other], str)
                    cells.append(f"{ours['median'] / both[other]['median']:.2f}" if known else "")
                lines.append(f"| L = {entry['length']} | {' | '.join(cells)} |")
        lines.append("")
    if results["memory"]:
        lines += [
            "| peak memory of a step | Performer | X (OPT) | Performer ÷ X | Transformer |",
            "|---|---|---|---|---|",
            *(_memory_line(entry) for entry in results["memory"]),
        ]
    return "\n".join(lines)


def _memory_line(entry: dict[str, Any]) -> str:
    sizes = [entry["bytes"].get(name, "") for name in ("performer-positive", "identity", "exact")]
    ours, floor, exact = (
        f"{size / 2**20:,.0f} MiB" if isinstance(size, int) else size for size in sizes
    )
    ratio = f"{sizes[0] / sizes[1]:.2f}" if all(isinstance(x, int) for x in sizes[:2]) else ""
    return f"| {entry['size']}, L = {entry['length']} | {ours} | {floor} | {ratio} | {exact} |"
