"""Figure 5, right: training on books with features redrawn or kept, Gaussian or on the sphere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from performers.reproduction import read_texts, resumable_folder
from performers.reproduction.books import Books, evaluations, model_fields
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """Masked language modeling of windows of books, bidirectional, everything from scratch.

    The paper trains on PG-19; its size of the model is not said, "paper" is its regular one.
    """

    texts: str = "novels"  # or "excerpts", which are in the repository
    held_out: str = "Persuasion"
    vocab_size: int = 32768
    length: int = 1024
    num_valid: int = 128
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_projections: int = 256
    redraw_every: int = 1000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    steps: int = 100_000
    evaluations: int = 10
    seed: int = 0


PAPER = Config()
REDUCED = replace(
    PAPER, vocab_size=512, length=128, num_valid=128, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, redraw_every=150, batch_size=8, learning_rate=2e-3, warmup_steps=50,
    steps=6000, evaluations=12,
)  # fmt: skip
SMOKE = replace(
    REDUCED, texts="excerpts", held_out="persuasion", vocab_size=128, length=32, num_valid=16,
    hidden_size=16, num_attention_heads=2, num_projections=16, redraw_every=2, warmup_steps=2,
    steps=6, evaluations=2,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

FAVOR = {"attention": "performer-positive"}
# Fields of the model, and whether ω is redrawn while it trains.
MECHANISMS: dict[str, tuple[dict[str, Any], bool]] = {
    "Transformer": ({"attention": "exact"}, False),
    "FAVOR+, redrawn": (FAVOR, True),
    "FAVOR+, not redrawn": (FAVOR, False),
    "SMREG, redrawn": ({**FAVOR, "distribution": "sphere"}, True),
}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    texts, origin = read_texts(config.texts, report)
    books = Books.prepare(
        texts, config.held_out, "windows", config.vocab_size, config.length, config.num_valid,
        config.seed,
    )  # fmt: skip
    curves: dict[str, list[tuple[int, float, float]]] = {}
    with resumable_folder("figure-5-right", config) as folder:
        for index, (name, (mechanism, is_redrawn)) in enumerate(MECHANISMS.items()):
            report(f"training for {config.steps} steps: {name}")
            trained = books.train_model(
                folder / str(index), model_fields(config, mechanism), _trainer(config),
                config.seed, redraw_every=config.redraw_every if is_redrawn else 0,
            )  # fmt: skip
            curves[name] = evaluations(trained)
    return {
        "curves": curves,
        "baseline": books.baseline,
        "multiplier": books.multiplier,
        "windows": {"train": len(books.train), "valid": len(books.valid)},
        "texts": origin,
    }


def _trainer(config: Config) -> dict[str, Any]:
    every = config.steps // config.evaluations
    return {
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "eval_strategy": "steps",
        "eval_steps": every,
        "logging_steps": every,
        "save_steps": every,
        "disable_tqdm": True,
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    baseline, multiplier = results["baseline"], results["multiplier"]
    with style.context(STYLE):
        drawn = Figure(figsize=(10.4, 4.6), layout="constrained")
        accuracy, perplexity = drawn.subplots(1, 2)
        for (name, curve), color in zip(
            results["curves"].items(), ("black", *COLORS), strict=False
        ):
            steps, accuracies, losses = zip(*curve, strict=True)
            line = {"color": color, "marker": "o", "markersize": 3, "label": name}
            accuracy.plot(steps, accuracies, **line)
            perplexity.plot(steps, [math.exp(multiplier * loss) for loss in losses], **line)
        dashed = {"color": BASELINE_COLOR, "linestyle": "--", "label": "empirical baseline"}
        accuracy.axhline(baseline["accuracy"], **dashed)
        perplexity.axhline(math.exp(multiplier * baseline["loss"]), **dashed)
        accuracy.set(title="Accuracy at hidden tokens", xlabel="gradient steps")
        accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        perplexity.set(title="Perplexity per word", xlabel="gradient steps", yscale="log")
        handles, labels = accuracy.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    baseline, multiplier = results["baseline"], results["multiplier"]
    rows = {"empirical baseline": (baseline["accuracy"], baseline["loss"])}
    rows |= {name: tuple(curve[-1][1:]) for name, curve in results["curves"].items()}
    count, windows = baseline["num_scored"], results["windows"]["valid"]
    accuracy = rows["Transformer"][0]
    reached = {name: row[0] for name, row in rows.items()}
    half = {name: _steps_to(curve, accuracy / 2) for name, curve in results["curves"].items()}
    standard_error = (accuracy * (1 - accuracy) / count) ** 0.5
    redrawn = reached["FAVOR+, redrawn"]
    claims = {
        "redrawn features end above those that are kept": redrawn - reached["FAVOR+, not redrawn"],
        "redrawn features end within a point of the Transformer": redrawn - (accuracy - 0.01),
        "SMREG ends above Gaussian features, both redrawn": reached["SMREG, redrawn"] - redrawn,
    }
    lines = [
        f"| after {config['steps']} steps | accuracy | loss | perplexity per word | steps to half "
        "the Transformer's accuracy |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {accuracy:.1%} | {loss:.3f} | {math.exp(multiplier * loss):.0f} | "
            f"{half.get(name, '')} |"
            for name, (accuracy, loss) in rows.items()
        ),
        "",
        f"At {count:,} hidden tokens of {windows} windows of the held-out book; "
        f"one standard error of an accuracy is about "
        f"{100 * standard_error:.1f} points. Perplexity per word is "
        f"exp({multiplier:.4f} · loss): there are so many tokens to a word.",
        "",
        "| the paper | margin in points | holds |",
        "|---|---|---|",
        *(
            f"| {claim} | {100 * margin:+.1f} | {_verdict(margin, standard_error)} |"
            for claim, margin in claims.items()
        ),
    ]
    return "\n".join(lines)


def _steps_to(curve: list[list[float]], accuracy: float) -> str:
    """The first evaluation with this accuracy."""
    steps = [step for step, reached, _ in curve if reached >= accuracy]
    return f"{steps[0]:.0f}" if steps else "not reached"


def _verdict(margin: float, standard_error: float) -> str:
    """Both accuracies have an error: below twice that of their difference nothing is decided."""
    if abs(margin) < 2 * 2**0.5 * standard_error:
        return "undecided"
    return "yes" if margin > 0 else "no"
