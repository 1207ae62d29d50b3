"""Figure 18: whether the Linear Transformer trains, and what its sums and normalizers do to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from performers.models import PerformerPreTrainedModel
from performers.nn.mechanisms import Favor
from performers.records import markdown_table
from performers.reproduction import kept, resumable_folder
from performers.reproduction.means import Mean
from performers.reproduction.proteins import Proteins
from performers.reproduction.steps import (
    Steps,
    drawn_batches,
    rows_with,
    scored_batches,
    train_for_steps,
)
from performers.train.config import RunConfig
from performers.train.tasks import TASKS, build_model
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

from .attentions import ATTENTIONS, errors_of_output


@dataclass(frozen=True)
class Config:
    """Windows of `length` tokens of whole proteins; every model and learning rate, for all `seeds`.

    `shifts`: by how much queries lie below 0 where the error of the output is measured.
    The learning rate of the paper is 1e-3.
    """

    source: str = "swissprot.fasta.gz"
    length: int = 1024
    num_scored: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 36
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    num_projections: int = 256
    directions: tuple[str, ...] = ("U", "B")
    learning_rates: tuple[float, ...] = (1e-3,)
    batch_size: int = 128
    warmup_steps: int = 0
    steps: int = 150_000
    evaluations: int = 150
    shifts: tuple[float, ...] = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0)
    seeds: int = 3
    seed: int = 0


PAPER = Config()
# So few steps show an instability only at learning rates that are too large for them.
REDUCED = replace(
    PAPER, source="sample", length=128, num_scored=32, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=128, num_projections=32, directions=("U",),
    learning_rates=(3e-3, 3e-2), batch_size=4, steps=60, evaluations=3,
)  # fmt: skip
SMOKE = replace(
    REDUCED, length=32, num_scored=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, num_projections=8, learning_rates=(1e-3,), batch_size=2, steps=2,
    evaluations=1, shifts=(0.0, 8.0), seeds=1,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

DIRECTIONS = {"U": "causal-lm", "B": "masked-lm"}
RELU = "Performer-ReLU"
LINES = dict(zip((*ATTENTIONS, RELU), COLORS, strict=False))


def build(config: Config, name: str, direction: str, seed: int) -> PerformerPreTrainedModel:
    """Performer-ReLU, or a Linear Transformer whose attention is computed as its name says."""
    torch.manual_seed(seed)
    fields = {
        "attention": "performer-relu" if name == RELU else "linear-transformer",
        "hidden_act": "relu",  # as the paper has it, to leave no other difference
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_projections": config.num_projections,
        "max_position_embeddings": config.length,
        "hidden_dropout_prob": 0.0,
    }
    model = build_model(RunConfig(task=DIRECTIONS[direction], seed=seed, model=fields))
    for module in model.modules():
        if isinstance(module, Favor) and name in ATTENTIONS:
            module.attend = ATTENTIONS[name]
    return model


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"reading {config.source}")
    proteins = Proteins.read(
        config.source, config.length, config.num_scored, {"valid": 0.1}, concatenate=True
    )

    def trained(name: str, direction: str, learning_rate: float, seed: int) -> dict[str, Any]:
        task = TASKS[DIRECTIONS[direction]]
        plan = Steps(config.steps, config.evaluations, learning_rate, config.warmup_steps)
        return train_for_steps(
            build(config, name, direction, seed),
            drawn_batches(proteins.train, task, config.batch_size, seed),
            scored_batches(proteins.scored["valid"], task, 32, config.seed),
            plan, task.shift,
        )  # fmt: skip

    rows = []
    keys = ("name", "direction", "learning_rate", "seed")
    with resumable_folder("figure-18", config) as folder:
        for direction in config.directions:
            for learning_rate in config.learning_rates:
                for name in LINES:
                    report(f"{direction}, learning rate {learning_rate:g}: {name}")
                    for seed in range(config.seed, config.seed + config.seeds):
                        case = (name, direction, learning_rate, seed)
                        path = folder / ("-".join(map(str, case)) + ".json")
                        found = kept(path, partial(trained, *case))
                        rows.append({**dict(zip(keys, case, strict=True)), **found})
    return {
        "windows": proteins.counts(),
        "baseline": {
            direction: proteins.baseline(DIRECTIONS[direction]) for direction in config.directions
        },
        "rows": rows,
        "errors": errors_of_output(config.shifts, config.seed),
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    direction, rate = config["directions"][0], max(config["learning_rates"])
    with style.context(STYLE):
        drawn = Figure(figsize=(11.2, 4.4), layout="constrained")
        loss, gradient, error = drawn.subplots(1, 3)
        for row in rows_with(results, direction=direction, learning_rate=rate):
            _draw_run(loss, gradient, row)
        baseline = results["baseline"][direction]["valid"]["loss"]
        loss.axhline(baseline, color=BASELINE_COLOR, linestyle=":")
        loss.set(title=f"({direction}), learning rate {rate:g}: validation loss")
        gradient.set(title="Largest norm of the gradient", yscale="log")
        for axes in (loss, gradient):
            axes.set_xlabel("gradient steps")
        for name, errors in results["errors"].items():
            error.plot(config["shifts"], errors, color=LINES[name], marker=".")
        error.set(
            title="Error of the output, float64 = 0", xlabel="queries lie so far below 0",
            yscale="log",
        )  # fmt: skip
        handles = [Line2D([], [], color=color, label=name) for name, color in LINES.items()]
        handles += [
            Line2D([], [], color="black", marker="x", linestyle="", label="NaN: the run ends"),
            Line2D([], [], color=BASELINE_COLOR, linestyle=":", label="empirical baseline"),
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=4)
    return drawn


def _draw_run(loss: Axes, gradient: Axes, row: dict[str, Any]) -> None:
    """Its losses and the largest norms of its gradients, with a cross where it was stopped."""
    color = LINES[row["name"]]
    steps, _, losses = zip(*row["curve"], strict=True)
    known = [math.nan if value is None else value for value in losses]
    loss.plot(steps, known, color=color, marker=".")
    if row["stopped"] is not None:
        loss.plot(row["stopped"], known[-1], color=color, marker="x", markersize=9)
    if row["gradients"]:
        gradient.plot(steps[1:], row["gradients"], color=color, marker=".")


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    counts = results["windows"]
    first = config["directions"][0]
    perplexity = results["baseline"][first]["valid"]["perplexity"]
    parts = [
        f"{config['steps']} steps of {config['batch_size']} windows out of "
        f"{counts['sequences']:,}, seeds: {config['seeds']}; scored on "
        f"{counts['scored valid']} others. ± is one standard error over the seeds that came to the "
        "end. The empirical baseline has perplexity "
        f"{perplexity:.2f} ({first}).",
        markdown_table(list(_table(config, results))),
        markdown_table(list(_errors(config, results))),
    ]
    return "\n\n".join(parts)


def _table(config: dict[str, Any], results: dict[str, Any]) -> Iterator[list[str]]:
    yield ["", "learning rate", "attention", "ended in NaN", "perplexity", "largest gradient"]
    for direction in config["directions"]:
        for rate in config["learning_rates"]:
            for name in LINES:
                runs = rows_with(results, direction=direction, learning_rate=rate, name=name)
                ended = [row for row in runs if row["stopped"] is None]
                last = [math.exp(min(row["curve"][-1][2] or 700.0, 700.0)) for row in ended]
                largest = max((max(row["gradients"], default=0.0) for row in runs), default=0.0)
                yield [
                    direction, f"{rate:g}", name, f"{len(runs) - len(ended)} of {len(runs)}",
                    Mean.of(last).number() if last else "–", f"{largest:.3g}",
                ]  # fmt: skip


def _errors(config: dict[str, Any], results: dict[str, Any]) -> Iterator[list[str]]:
    yield ["error of the output, queries below 0 by"] + [f"{shift:g}" for shift in config["shifts"]]
    for name, errors in results["errors"].items():
        yield [name] + [f"{error:.1e}" for error in errors]
