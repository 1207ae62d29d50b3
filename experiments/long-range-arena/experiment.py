"""Figure 19: every mechanism of the library on the tasks of Long Range Arena, in equal time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from performers.models import MECHANISMS
from performers.records import describe_environment, markdown_table
from performers.reproduction import kept, resumable_folder
from performers.viz.figures import COLORS, STYLE, label_points

from .tasks import CHECKOUT, OFFICIAL, PACKAGES, TASKS, Amount, Split, load
from .training import Model, Training, measure

# What a mechanism takes instead of its own defaults, which may depend on the length.
OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "local": lambda length: {"window_size": 50},
    "sparse-transformer": lambda length: {"stride": math.isqrt(length)},
    "longformer": lambda length: {"window_size": min(256, length // 4)},
    "linformer": lambda length: {"num_projections": min(256, length)},
    "reformer": lambda length: {"num_buckets": 2 * max(1, length // 64)},
    "routing-transformer": lambda length: {"num_clusters": math.isqrt(length)},
}

# Of FAVOR+ the two kernels that the paper trains with, and the one of this library.
MEASURED = (
    *(name for name in MECHANISMS if not name.startswith("performer-")),
    "performer-positive",
    "performer-relu",
    "performer-sharp",
)

# Accuracy in percent on ListOps, Text, Retrieval, Image and Pathfinder, as published: Tay et al.
# 2021, "Long Range Arena", Table 1, which is the upper table of Figure 19.
PUBLISHED = {
    "exact": (36.37, 64.27, 57.46, 42.44, 71.40),
    "local": (15.82, 52.98, 53.39, 41.46, 66.63),
    "sparse-transformer": (17.07, 63.58, 59.59, 44.24, 71.71),
    "longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "sinkhorn": (33.67, 61.20, 53.83, 41.23, 67.45),
    "synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
    "big-bird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "linear-transformer": (16.13, 65.90, 53.09, 42.34, 75.30),
    "performer-relu": (18.01, 65.40, 53.82, 42.77, 77.05),
}


@dataclass(frozen=True)
class Config:
    """A task, by its name in `TASKS`, has an amount of data, a model and a training, which are the
    same for every mechanism.
    """

    amounts: dict[str, Amount]
    models: dict[str, Model]
    trainings: dict[str, Training]
    source: str
    mechanisms: tuple[str, ...] = MEASURED
    num_projections: int = 256
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0


# The published sizes and hyperparameters of each task. Learning rates that are published as
# 0.05 / √step have their peak here, at the end of the warmup: 0.05 / √1000 and 0.05 / √8000.
SMALL = Model(32, 1, 2, 32, head_dim=8, hidden_dropout_prob=0.1)
PAPER = Config(
    amounts={
        "listops": Amount(2000, 96_000, 2000),
        "text": Amount(4000, 25_000, 25_000),
        "retrieval": Amount(4000, 147_086, 17_437),
        "image": Amount(1024, 45_000, 10_000),
        "pathfinder": Amount(1024, 160_000, 20_000),
        "path-x": Amount(16_384, 160_000, 20_000),
    },
    models={
        "listops": Model(512, 6, 8, 2048, hidden_dropout_prob=0.1),
        "text": Model(256, 4, 4, 1024, hidden_dropout_prob=0.1),
        "retrieval": Model(128, 4, 4, 512, hidden_dropout_prob=0.1),
        "image": Model(32, 1, 1, 64, hidden_dropout_prob=0.3),
        "pathfinder": SMALL,
        "path-x": SMALL,
    },
    trainings={
        "listops": Training(32, 1.6e-3, 1000 / 5000, 0.1, 5000),
        "text": Training(32, 5.6e-4, 8000 / 20_000, 0.1, 20_000),
        "retrieval": Training(32, 5.6e-4, 8000 / 5000, 0.1, 5000),
        "image": Training(256, 5e-4, 1 / 200, 0.0, 35_000),
        "pathfinder": Training(512, 1e-3, 1 / 200, 0.0, 62_400),
        "path-x": Training(64, 1e-3, 1 / 200, 0.0, 500_000),
    },
    source=OFFICIAL,
)

REDUCED_AMOUNTS = {
    "listops": Amount(64, 16_000, 400),
    "text": Amount(256, 3000, 400),
    "retrieval": Amount(128, 16_000, 400),
    "image": Amount(196, 60_000, 400),
    "pathfinder-short": Amount(64, 20_000, 800),
}
# Amounts to test with are multiples of the batch, so that no last batch has a shape of its own, for
# which kernels are compiled.
TRAINING = Training(8, 1e-3, 0.1, 0.01, 100, seconds=4.0)
REDUCED = replace(
    PAPER,
    amounts=REDUCED_AMOUNTS,
    models={
        "listops": Model(64, 2, 2, 128),
        "text": Model(64, 2, 2, 128),
        "retrieval": Model(64, 1, 2, 128, initializer_range=0.1),
        "image": Model(64, 1, 2, 128),
        "pathfinder-short": Model(32, 1, 1, 64, initializer_range=0.2, position="rotary"),
    },
    trainings={
        "listops": TRAINING,
        "text": TRAINING,
        "retrieval": Training(16, 3e-3, 0.1, 0.01, 100, seconds=8.0),
        "image": Training(16, 1e-2, 0.1, 0.01, 100, seconds=6.0),
        "pathfinder-short": Training(32, 3e-3, 0.1, 0.0, 100, seconds=45.0),
    },
    source=PACKAGES,
    num_projections=64,
)
SMOKE_AMOUNTS = {
    "listops": Amount(32, 32, 16),
    "text": Amount(64, 32, 16),
    "retrieval": Amount(64, 32, 16),
    "image": Amount(64, 32, 16),
    "pathfinder-short": Amount(64, 8, 4),
}
SMOKE = replace(
    REDUCED,
    amounts=SMOKE_AMOUNTS,
    models=dict.fromkeys(SMOKE_AMOUNTS, Model(16, 1, 2, 16)),
    trainings=dict.fromkeys(SMOKE_AMOUNTS, replace(TRAINING, batch_size=2, steps=2, seconds=None)),
    source=CHECKOUT,
    mechanisms=("exact", "performer-relu"),
    num_projections=8,
)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}


@dataclass(frozen=True)
class Prepared:
    """What decides on the data: whatever is trained on it finds it again."""

    amounts: dict[str, Amount]
    source: str
    seed: int


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    def trained(name: str, split: Split, mechanism: str) -> dict[str, Any]:
        report(f"training on {name}: {mechanism}")
        amount = config.amounts[name]
        measured = measure(
            TASKS[name], split, (amount, config.models[name], config.trainings[name]),
            fields(mechanism, amount.length), config.num_projections, config.seed,
            config.device,
        )  # fmt: skip
        return {"task": name, "mechanism": mechanism, **measured}

    data = Prepared(config.amounts, config.source, config.seed)
    with (
        resumable_folder("long-range-arena-data", data) as prepared,
        resumable_folder("long-range-arena", config) as folder,
    ):
        splits = {
            name: load(prepared / f"{name}.npz", name, amount, config.source, config.seed, report)
            for name, amount in config.amounts.items()
        }
        rows = [
            kept(folder / name / f"{mechanism}.json", partial(trained, name, split, mechanism))
            for name, split in splits.items()
            for mechanism in config.mechanisms
        ]
    tasks = {
        name: {
            "train": len(split.train),
            "test": len(split.test),
            "most_frequent": split.test.most_frequent_share(),
            "shortcut": shortcut(split) if (shortcut := TASKS[name].shortcut) else None,
            "origin": split.origin,
        }
        for name, split in splits.items()
    }
    return {"tasks": tasks, "rows": rows, "device": _device(config.device)}


def fields(mechanism: str, length: int) -> dict[str, Any]:
    """Fields of a `PerformerConfig` that are those of the mechanism."""
    options = OPTIONS[mechanism](length) if mechanism in OPTIONS else None
    return {"attention": mechanism, "attention_options": options}


def _device(device: str) -> str:
    environment = describe_environment()
    return environment["accelerators"][0] if device == "cuda" else environment["processor"]


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    scores = _scores(results)
    with rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 6.0), layout="constrained")
        axes = drawn.subplots()
        places = {}
        largest = max(filter(None, (score.bytes for score in scores.values())), default=1)
        for name, score in scores.items():
            color = COLORS[0] if name.startswith("performer") else COLORS[1]
            if name in ("exact", "identity"):
                color = "#111827"
            size = 40 + 1200 * (score.bytes or 0) / largest
            places[name] = (score.speed, 100 * score.accuracy)
            axes.scatter(*places[name], s=size, color=color, alpha=0.45, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set(
            xlabel="steps per second ÷ those of exact attention",
            ylabel="accuracy in percent, mean of the tasks",
            title="Score, speed and memory (the area of a circle)",
        )
        label_points(axes, places)
    return drawn


@dataclass(frozen=True)
class Score:
    """Of one mechanism: accuracies by task, their mean, steps per second ÷ those of exact attention
    (the geometric mean of the tasks), and the mean of its peaks of memory.
    """

    accuracies: dict[str, float]
    speed: float
    bytes: float | None

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies.values()) / len(self.accuracies)


def _scores(results: dict[str, Any]) -> dict[str, Score]:
    rows: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        rows.setdefault(row["mechanism"], {})[row["task"]] = row
    rates = {
        name: {task: row["steps"] / row["seconds"] for task, row in of_task.items()}
        for name, of_task in rows.items()
    }
    scores = {}
    for name, of_task in rows.items():
        logs = [math.log(rates[name][task] / rates["exact"][task]) for task in of_task]
        peaks = [row["bytes"] for row in of_task.values()]
        scores[name] = Score(
            {task: row["accuracy"] for task, row in of_task.items()},
            math.exp(sum(logs) / len(logs)),
            None if None in peaks else sum(peaks) / len(peaks),
        )
    return scores


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    tasks, scores = results["tasks"], _scores(results)
    errors = {
        name: (task["most_frequent"] * (1 - task["most_frequent"]) / task["test"]) ** 0.5
        for name, task in tasks.items()
    }
    chance = {name: task["most_frequent"] for name, task in tasks.items()}
    best = {name: max(score.accuracies[name] for score in scores.values()) for name in tasks}
    top = max(score.accuracy for score in scores.values())
    lines = [
        [
            "accuracy in percent",
            *tasks,
            "mean",
            "published mean",
            "above chance in",
            "speed ÷ exact",
            "peak memory",
        ]
    ]
    for name, score in scores.items():
        published = PUBLISHED.get(name)
        above = [score.accuracies[task] > chance[task] + 2 * errors[task] for task in tasks]
        lines.append(
            [
                name,
                *(_percent(score.accuracies[task], best[task]) for task in tasks),
                _percent(score.accuracy, top),
                f"{sum(published) / len(published):.2f}" if published else "",
                f"{sum(above)} of {len(above)}",
                f"{score.speed:.2f}",
                "not known" if score.bytes is None else f"{score.bytes / 2**20:,.0f} MiB",
            ]
        )
    lines.append(
        ["the most frequent label", *(f"{100 * chance[task]:.1f}" for task in tasks), *[""] * 5]
    )
    lines.append(
        [
            "a rule of one number",
            *(
                "" if task["shortcut"] is None else f"{100 * task['shortcut']:.1f}"
                for task in tasks.values()
            ),
            *[""] * 5,
        ]
    )
    counts = "; ".join(
        f"{name}: {_budget(config, name)}, {task['train']:,} to train on, {task['test']:,} to test "
        f"with, one standard error {100 * errors[name]:.1f} points"
        for name, task in tasks.items()
    )
    return (
        f"{markdown_table(lines)}\n\n"
        f"On {results['device']}, the same training for every mechanism. {counts}. Above chance: "
        "by more than two standard errors more often right than the most frequent label is.\n\n"
        f"{_claims(scores, chance, errors)}"
    )


def _budget(config: dict[str, Any], task: str) -> str:
    length, training = config["amounts"][task]["length"], config["trainings"][task]
    seconds, steps = training["seconds"], training["steps"]
    return f"{f'{steps:,} steps' if seconds is None else f'{seconds:g} s'} on {length:,} tokens"


def _percent(accuracy: float, best: float) -> str:
    number = f"{100 * accuracy:.1f}"
    return f"**{number}**" if accuracy == best else number


def _claims(scores: dict[str, Score], chance: dict[str, float], errors: dict[str, float]) -> str:
    """What the paper and this experiment are to show, and whether it shows."""
    compared = [
        name for name in ("exact", "performer-positive", "performer-relu") if name in scores
    ]
    lines = [["above the most frequent label by so many standard errors", *chance]]
    for name in filter(scores.__contains__, compared):
        margins = ((scores[name].accuracies[task] - chance[task]) / errors[task] for task in chance)
        lines.append([name, *(f"{margin:+.1f}" for margin in margins)])
    fast = {name: score for name, score in scores.items() if score.speed > 1 and name != "identity"}
    if not fast:
        first = max(scores, key=lambda name: scores[name].accuracy)
        return (
            f"{markdown_table(lines)}\n\nNo mechanism that attends is faster than exact attention "
            f"here, at these lengths. The highest mean has {first}."
        )
    first = max(fast, key=lambda name: fast[name].accuracy)
    return (
        f"{markdown_table(lines)}\n\n"
        "The paper: of the mechanisms that scale Performers have the highest score. Here, of those "
        f"that are faster than exact attention ({', '.join(fast)}) {first} has the highest mean."
    )
