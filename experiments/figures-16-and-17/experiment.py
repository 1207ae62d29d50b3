"""Figures 16 and 17: eight kernels, with the normalizer and without, at two batch sizes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from performers.functional import favor_attention
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
from performers.viz.figures import BASELINE_COLOR, STYLE

TASK = TASKS["masked-lm"]


@dataclass(frozen=True)
class Config:
    """Each kernel trains for so many `steps` with each of the `batch_sizes` and `seeds`.

    The paper says 128 sequences of 512 tokens to a device, on 2 × 2 and 4 × 4 TPUs, taken here as 4
    and 16 devices; it does not say the model or the number of steps: "paper" is its regular model,
    for 100,000 steps.
    """

    source: str = "swissprot.fasta.gz"
    length: int = 512
    num_scored: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_projections: int = 256
    kernels: tuple[str, ...] = (
        "sigmoid", "exp", "relu", "abs", "gelu", "cos", "tanh", "identity",
    )  # fmt: skip
    batch_sizes: tuple[int, ...] = (512, 2048)
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    steps: int = 100_000
    evaluations: int = 20
    seeds: int = 3
    seed: int = 0


PAPER = Config()
# A narrow model takes a larger learning rate, and so do few steps.
REDUCED = replace(
    PAPER, source="sample", length=64, num_scored=128, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=128, num_projections=32, batch_sizes=(4, 16),
    learning_rate=5e-3, steps=100, evaluations=4,
)  # fmt: skip
SMOKE = replace(
    REDUCED, length=32, num_scored=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, num_projections=8, kernels=("relu", "cos"), batch_sizes=(2, 3), steps=2,
    evaluations=1, seeds=1,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

NORMALIZED, PLAIN = "renormalized", "not renormalized"
ACCURACY, PERPLEXITY = 1, 2  # places in a point of a curve


def build(config: Config, kernel: str, is_normalized: bool, seed: int) -> PerformerPreTrainedModel:
    """A model with weights and ω of this seed, the same for all kernels."""
    torch.manual_seed(seed)
    fields = {
        "attention": f"performer-{kernel}",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_projections": config.num_projections,
        "max_position_embeddings": config.length,
        "hidden_dropout_prob": 0.0,
    }
    with warnings.catch_warnings():
        # That features have signs is what is measured here.
        warnings.simplefilter("ignore", UserWarning)
        model = build_model(RunConfig(task="masked-lm", seed=seed, model=fields))
    if not is_normalized:
        for module in model.modules():
            if isinstance(module, Favor):
                module.attend = partial(favor_attention, normalize=False)
    return model


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"reading {config.source}")
    proteins = Proteins.read(config.source, config.length, config.num_scored, {"valid": 0.1})
    valid = scored_batches(proteins.scored["valid"], TASK, 32, config.seed)
    plan = Steps(config.steps, config.evaluations, config.learning_rate, config.warmup_steps)

    def measured(kernel: str, is_normalized: bool, batch_size: int, seed: int) -> dict[str, Any]:
        batches = drawn_batches(proteins.train, TASK, batch_size, seed)
        model = build(config, kernel, is_normalized, seed)
        return train_for_steps(model, batches, valid, plan, TASK.shift)

    rows = []
    with resumable_folder("figures-16-and-17", config) as folder:
        for batch_size in config.batch_sizes:
            for kernel in config.kernels:
                report(f"batches of {batch_size}: {kernel}")
                for is_normalized in (True, False):
                    for seed in range(config.seed, config.seed + config.seeds):
                        case = (kernel, is_normalized, batch_size, seed)
                        path = folder / "-".join(map(str, case))
                        found = kept(path.with_suffix(".json"), partial(measured, *case))
                        names = ("kernel", "is_normalized", "batch_size", "seed")
                        rows.append({**dict(zip(names, case, strict=True)), **found})
    return {"proteins": proteins.counts(), "baseline": proteins.baseline("masked-lm"), "rows": rows}


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    sizes = config["batch_sizes"]
    colors = dict(zip(config["kernels"], colormaps["tab10"].colors, strict=False))
    with style.context(STYLE):
        drawn = Figure(figsize=(9.6, 3.4 * len(sizes) + 0.6), layout="constrained")
        panels = drawn.subplots(len(sizes), 2, sharex=True, sharey=True, squeeze=False)
        for line, size in zip(panels, sizes, strict=True):
            for axes, is_normalized in zip(line, (True, False), strict=True):
                for row in rows_with(results, is_normalized=is_normalized, batch_size=size):
                    _draw_run(axes, row, colors[row["kernel"]])
                baseline = results["baseline"]["valid"]["perplexity"]
                axes.axhline(baseline, color=BASELINE_COLOR, linestyle=":")
                words = NORMALIZED if is_normalized else PLAIN
                axes.set(title=f"batches of {size}, {words}", yscale="log")
                axes.set_yticks([16, 20, 30, 40, 60], minor=False)
                axes.yaxis.set_major_formatter("{x:.0f}")
                axes.yaxis.set_minor_locator(NullLocator())
            line[0].set_ylabel("perplexity")
        for axes in panels[-1]:
            axes.set_xlabel("gradient steps")
        handles = [Line2D([], [], color=color, label=kernel) for kernel, color in colors.items()]
        handles += [
            Line2D([], [], color="black", marker="x", linestyle="", label="NaN: the run ends"),
            Line2D([], [], color=BASELINE_COLOR, linestyle=":", label="empirical baseline"),
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=5)
    return drawn


def _draw_run(axes: Axes, row: dict[str, Any], color: Any) -> None:
    """Its perplexities, and a cross where it was stopped, as high as the last of them."""
    points = [(step, math.exp(loss)) for step, _, loss in row["curve"] if loss is not None]
    axes.plot(*zip(*points, strict=True), color=color, marker=".", alpha=0.8)
    if row["stopped"] is not None:
        axes.plot(row["stopped"], points[-1][1], color=color, marker="x", markersize=8)


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    baseline = results["baseline"]["valid"]
    counts = results["proteins"]
    tables = [
        f"After {config['steps']} steps of each of {len(results['rows'])} runs, on "
        f"{counts['sequences']:,} proteins, seeds: {config['seeds']}; scored at "
        f"{baseline['num_scored']:,} hidden amino acids of {counts['scored valid']} others. ± is "
        "one standard error over the seeds that came to the end. The empirical baseline has "
        f"accuracy {baseline['accuracy']:.2%} and perplexity {baseline['perplexity']:.2f}.",
        markdown_table(list(_table(config, results, "accuracy", ACCURACY, Mean.percent))),
        markdown_table(list(_table(config, results, "perplexity", PERPLEXITY, Mean.number))),
        "\n".join(_findings(config, results)),
    ]
    return "\n\n".join(tables)


def _runs(results: dict[str, Any], kernel: str, case: tuple[bool, int]) -> list[dict[str, Any]]:
    is_normalized, size = case
    return rows_with(results, kernel=kernel, is_normalized=is_normalized, batch_size=size)


def _cases(config: dict[str, Any]) -> list[tuple[bool, int]]:
    return [
        (is_normalized, size) for size in config["batch_sizes"] for is_normalized in (True, False)
    ]


def _ends(results: dict[str, Any], kernel: str, case: tuple[bool, int], column: int) -> list[float]:
    """An entry of the last point of each curve that came to the end; of a loss its exponential."""
    last = [
        row["curve"][-1][column] for row in _runs(results, kernel, case) if row["stopped"] is None
    ]
    return [math.exp(loss) for loss in last] if column == PERPLEXITY else last


def _table(
    config: dict[str, Any], results: dict[str, Any], name: str, column: int,
    printed: Callable[[Mean], str],
) -> Iterator[list[str]]:  # fmt: skip
    cases = _cases(config)
    yield [name] + [
        f"{NORMALIZED if is_normalized else PLAIN}, {size}" for is_normalized, size in cases
    ]
    for kernel in config["kernels"]:
        cells = [kernel]
        for case in cases:
            found = _ends(results, kernel, case, column)
            stopped = [
                str(row["stopped"])
                for row in _runs(results, kernel, case)
                if row["stopped"] is not None
            ]
            words = [printed(Mean.of(found))] if found else []
            words += [f"NaN at step {', '.join(stopped)}"] if stopped else []
            cells.append("; ".join(words))
        yield cells


def _findings(config: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """What the paper says of the figures, beside what the perplexities of the runs say."""
    reached = {
        (kernel, *case): Mean.of(ended)
        for case in _cases(config)
        for kernel in config["kernels"]
        if (ended := _ends(results, kernel, case, PERPLEXITY))
    }
    stopped = sorted(
        {
            f"{row['kernel']}, {NORMALIZED if row['is_normalized'] else PLAIN}"
            for row in results["rows"]
            if row["stopped"] is not None
        }
    )
    yield f"- Runs of certain kernels end in NaN: here those of {'; '.join(stopped) or 'none'}."
    for size in config["batch_sizes"]:
        of_size = [key for key in reached if key[2] == size]
        best = sorted(of_size, key=lambda key: reached[key].value)[:3]
        named = ", ".join(
            f"{kernel} ({NORMALIZED if is_normalized else PLAIN})"
            for kernel, is_normalized, _ in best
        )
        yield f"- Batches of {size}, the three of lowest perplexity: {named}."
    for size in config["batch_sizes"]:
        losses = {
            kernel: reached[kernel, False, size] - reached[kernel, True, size]
            for kernel in config["kernels"]
            if (kernel, False, size) in reached and (kernel, True, size) in reached
        }
        verdicts = {kernel: loss.is_above_0() for kernel, loss in losses.items()}
        words = {
            verdict: ", ".join(kernel for kernel in verdicts if verdicts[kernel] == verdict)
            for verdict in ("no", "yes", "undecided")
        }
        yield (
            f"- Batches of {size}, without the normalizer the perplexity is lower for "
            f"{words['no'] or 'none'}; higher for {words['yes'] or 'none'}; undecided for "
            f"{words['undecided'] or 'none'}."
        )
