"""Figure 6 and Table 2: five mechanisms train on proteins for the same time, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.records import markdown_table
from performers.reproduction import kept, resumable_folder
from performers.reproduction.means import Mean
from performers.reproduction.proteins import CURVES, Proteins, timed_run
from performers.train.config import RunConfig
from performers.viz.figures import COLORS, STYLE, label_accuracies, legend_of_accuracies


@dataclass(frozen=True)
class Config:
    """`fraction` of the proteins for each of validation, test and families that are held out.

    `seconds`: of training of each model, once for each of so many `seeds`: weights, ω, masks and
    the order of the proteins. The paper had the same hardware for all, and does not say how long;
    a week is this library's choice. `linformer_projections`: its k. `reformer_chunk`: positions of
    a chunk; there are half as many chunks as buckets.
    """

    source: str = "swissprot.fasta.gz"
    length: int = 1024
    fraction: float = 0.05
    num_scored: int = 8192
    hidden_size: int = 512
    num_hidden_layers: int = 36
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    num_projections: int = 256
    position: str = "rotary"
    initializer_range: float = 0.02
    linformer_projections: int = 600
    reformer_chunk: int = 64
    batch_size: int = 128
    learning_rate: float = 1e-3
    redraw_every: int = 1000
    seconds: float = 7 * 24 * 3600.0
    evaluations: int = 100
    seeds: int = 3
    directions: tuple[str, ...] = ("U", "B")
    bf16: bool = True
    workers: int = 4
    seed: int = 0


PAPER = Config()
# The same for a CPU, where one thread does it, and a GPU. Learned positions and larger first
# weights let a model learn within seconds where in a family's proteins which residue is frequent.
REDUCED = replace(
    PAPER, source="swissprot-families.fasta.gz", length=512, fraction=0.1, num_scored=128,
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
    num_projections=64, position="learned", initializer_range=0.1, linformer_projections=300,
    batch_size=4, redraw_every=100, seconds=30.0, evaluations=3, bf16=False, workers=0,
)  # fmt: skip
SMOKE = replace(
    REDUCED, source="sample", length=64, num_scored=8, hidden_size=16, num_hidden_layers=1,
    num_attention_heads=2, intermediate_size=16, num_projections=8, linformer_projections=8,
    reformer_chunk=8, batch_size=4, redraw_every=2, seconds=0.02, evaluations=1, seeds=1,
    directions=("B",), bf16=True,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

TRANSFORMER, RELU, SOFTMAX = "Transformer", "Performer-ReLU", "Performer-softmax"
REFORMER, LINFORMER = "Reformer", "Linformer"
LINES = dict(zip((RELU, SOFTMAX, REFORMER, LINFORMER), COLORS, strict=False))
LINES[TRANSFORMER] = "black"

DIRECTIONS = {"U": "causal-lm", "B": "masked-lm"}
TITLES = {
    "U": "(U): the next amino acid",
    "B": "(B): hidden amino acids",
}

# Accuracy in % and perplexity of Table 2, on the sets "test" and "ood".
TABLE_2 = {
    ("U", TRANSFORMER): {"test": (30.80, 9.37), "ood": (19.70, 13.20)},
    ("U", RELU): {"test": (31.58, 9.17), "ood": (18.44, 13.63)},
    ("B", TRANSFORMER): {"test": (33.32, 9.22), "ood": (25.07, 12.09)},
    ("B", RELU): {"test": (36.09, 8.36), "ood": (24.10, 12.26)},
    ("B", SOFTMAX): {"test": (33.00, 9.24), "ood": (23.48, 12.41)},
}
TABLE_2_BASELINE = {"test": (9.92, 17.80), "ood": (9.07, 17.93)}


def models(config: Config, direction: str) -> dict[str, dict[str, Any]]:
    """What is compared, by its name in the paper: fields of `PerformerConfig`."""
    # Appendix A.6: projections that are not learned, but redrawn.
    fixed = {"num_projections": config.linformer_projections, "is_learned": False}
    chunk = config.reformer_chunk
    hashes = {"chunk_size": chunk, "num_buckets": 2 * config.length // chunk}
    mechanisms = {
        TRANSFORMER: {"attention": "exact"},
        RELU: {"attention": "performer-relu"},
        SOFTMAX: {"attention": "performer-positive"},
        REFORMER: {"attention": "reformer", "attention_options": hashes},
        LINFORMER: {"attention": "linformer", "attention_options": fixed},
    }
    if direction == "U":  # its keys are sums over all positions, later ones too
        del mechanisms[LINFORMER]
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_projections": config.num_projections,
        "position": config.position,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.length,
        "hidden_dropout_prob": 0.0,  # less than one pass over the proteins has nothing to overfit
    }
    return {name: {**sizes, **mechanism} for name, mechanism in mechanisms.items()}


def training_run(config: Config, direction: str, model: Mapping[str, Any], seed: int) -> RunConfig:
    return timed_run(
        DIRECTIONS[direction], model, config.seconds,
        batch_size=config.batch_size, evaluations=config.evaluations,
        learning_rate=config.learning_rate, redraw_every=config.redraw_every, bf16=config.bf16,
        workers=config.workers, seed=seed,
    )  # fmt: skip


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"reading {config.source}")
    fractions = dict.fromkeys(("valid", "test", "ood"), config.fraction)
    proteins = Proteins.read(
        config.source, config.length, config.num_scored, fractions, seed=config.seed
    )
    runs: dict[str, dict[str, list[Any]]] = {direction: {} for direction in config.directions}
    with resumable_folder("figure-6", config) as folder:
        for seed in range(config.seed, config.seed + config.seeds):
            for direction in config.directions:
                for name, model in models(config, direction).items():
                    report(f"seed {seed}, {direction}, {config.seconds:g} s: {name}")
                    place = folder / str(seed) / direction / name
                    planned = training_run(config, direction, model, seed)
                    found = kept(place / "outcome.json", partial(proteins.measured, planned, place))
                    runs[direction].setdefault(name, []).append(found)
    return {
        "proteins": proteins.counts(),
        "baseline": {name: proteins.baseline(DIRECTIONS[name]) for name in config.directions},
        "runs": runs,
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(10.4, 4.9), layout="constrained")
        panels = drawn.subplots(1, len(config["directions"]), squeeze=False)[0]
        for axes, (direction, runs) in zip(panels, results["runs"].items(), strict=True):
            for name, of_seeds in runs.items():
                for split, line in zip(CURVES, ("--", "-"), strict=True):
                    # Of each evaluation: seconds and accuracy, mean over seeds.
                    curves = [one["curves"][split] for one in of_seeds]
                    points = [
                        [sum(column) / len(column) for column in zip(*point, strict=True)]
                        for point in zip(*curves, strict=False)
                    ]
                    seconds, accuracies, _ = zip(*points, strict=True)
                    axes.plot(seconds, accuracies, line, color=LINES[name], marker=".")
            accuracy = results["baseline"][direction]["valid"]["accuracy"]
            label_accuracies(axes, TITLES[direction], accuracy)
        legend_of_accuracies(drawn, LINES, columns=4)
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    seeds = config["seeds"]
    parts = [
        f"Each model trained for {config['seconds']:g} s, {_count(seeds, 'seed')}, on "
        f"{results['proteins']['sequences']:,} proteins; scored on "
        f"{results['proteins']['scored test']:,} of each set. "
        + ("± is one standard error over seeds." if seeds > 1 else "One seed has no error."),
        markdown_table(list(_table_2(results))),
        markdown_table(list(_costs(results))),
        markdown_table(list(_claims(results))),
    ]
    return "\n\n".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table_2(results: dict[str, Any]) -> Iterator[list[str]]:
    yield [
        "Table 2", "set", "model", "accuracy here", "the paper", "perplexity here", "the paper",
    ]  # fmt: skip
    for direction, runs in results["runs"].items():
        for split in ("test", "ood"):
            ours = results["baseline"][direction][split]
            theirs = TABLE_2_BASELINE[split]
            yield [
                direction, split, "empirical baseline",
                f"{ours['accuracy']:.2%}", f"{theirs[0]:.2f}%",
                f"{ours['perplexity']:.2f}", f"{theirs[1]:.2f}",
            ]  # fmt: skip
            for name, of_seeds in runs.items():
                paper = TABLE_2.get((direction, name), {}).get(split)
                accuracy, perplexity = (
                    Mean.of([one["scores"][split][metric] for one in of_seeds])
                    for metric in ("accuracy", "perplexity")
                )
                yield [
                    direction, split, name,
                    accuracy.percent(), "–" if paper is None else f"{paper[0]:.2f}%",
                    perplexity.number(), "–" if paper is None else f"{paper[1]:.2f}",
                ]  # fmt: skip


def _costs(results: dict[str, Any]) -> Iterator[list[str]]:
    yield ["what the time was enough for", "model", "weights", "steps", "million tokens"]
    for direction, runs in results["runs"].items():
        for name, of_seeds in runs.items():
            steps, tokens = (
                Mean.of([one[key] for one in of_seeds]).value for key in ("steps", "tokens")
            )
            weights = f"{of_seeds[0]['parameters']:,}"
            yield [direction, name, weights, f"{steps:,.0f}", f"{tokens / 1e6:.1f}"]


def _claims(results: dict[str, Any]) -> Iterator[list[str]]:
    """What the paper says of Figure 6, as differences of accuracies on the validation set."""
    yield ["the paper, validation set", "", "points of accuracy here", "holds"]
    for direction, runs in results["runs"].items():
        reached = {
            name: Mean.of([one["scores"]["valid"]["accuracy"] for one in of_seeds])
            for name, of_seeds in runs.items()
        }
        exact = reached[TRANSFORMER]
        least = Mean(results["baseline"][direction]["valid"]["accuracy"], 0.0)
        best = max((n for n in runs if n != RELU), key=lambda name: reached[name].value)
        worst = min(runs, key=lambda name: reached[name].value)
        claims = {
            f"Performer-ReLU is the best (next: {best})": reached[RELU] - reached[best],
            "Performer-ReLU is above the Transformer": reached[RELU] - exact,
            **{
                f"the {name} is below the Transformer": exact - reached[name]
                for name in (REFORMER, LINFORMER)
                if name in reached
            },
            f"all are above the empirical baseline (least: {worst})": reached[worst] - least,
        }
        for words, margin in claims.items():
            yield [words, direction, margin.points(), margin.is_above_0()]
        apart = reached[SOFTMAX] - exact
        room = Mean(0.01 - abs(apart.value), apart.error)
        yield [
            "Performer-softmax is within a point of the Transformer", direction,
            apart.points(), room.is_above_0(),
        ]  # fmt: skip
