"""Figure 15: lucky and unlucky ω, what redrawing mends, SMREG, and trigonometric features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from performers.models import PerformerForMaskedLM
from performers.records import markdown_table
from performers.reproduction import kept, read_texts, resumable_folder
from performers.reproduction.books import Books, model_fields, transfer_weights
from performers.reproduction.means import Mean
from performers.reproduction.steps import (
    Steps,
    drawn_batches,
    rows_with,
    scored_batches,
    train_for_steps,
)
from performers.viz.figures import COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """Masked language modeling of windows of books. All models start from the same weights: those
    of an exact Transformer after `pretraining_steps`, or untrained ones where that is 0.

    `redraw_every`: of models that are redrawn. `seeds`: of ω, or of batches.
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
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    pretraining_steps: int = 0
    steps: int = 100_000
    evaluations: int = 50
    redraw_every: int = 1000
    seeds: int = 6
    seed: int = 0


PAPER = Config()
# From scratch, attention stays even for longer than there is time, and any ω is good for that.
REDUCED = replace(
    PAPER, vocab_size=512, length=64, num_valid=64, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_projections=32, batch_size=8, learning_rate=2e-3, warmup_steps=10,
    pretraining_steps=1200, steps=80, evaluations=4, redraw_every=20,
)  # fmt: skip
SMOKE = replace(
    REDUCED, texts="excerpts", held_out="persuasion", vocab_size=128, length=32, num_valid=8,
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_projections=8, batch_size=2,
    warmup_steps=1, pretraining_steps=2, steps=4, evaluations=2, redraw_every=1, seeds=2,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

POSITIVE = {"attention": "performer-positive"}
SPHERE = {**POSITIVE, "distribution": "sphere"}
TRIGONOMETRIC = {"attention": "performer-trigonometric"}

KEPT, REDRAWN, MENDED = "kept", "redrawn", "redrawn from the middle on"
BATCHES, SMREG, TRIG = "kept, one ω, other batches", "SMREG, redrawn", "trigonometric, redrawn"
# The features of each, and what the seeds decide: ω, or the batches.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    KEPT: (POSITIVE, "ω"),
    MENDED: (POSITIVE, "ω"),
    REDRAWN: (POSITIVE, "ω"),
    BATCHES: (POSITIVE, "batches"),
    SMREG: (SPHERE, "ω"),
    TRIG: (TRIGONOMETRIC, "ω"),
}
LINES = dict(zip((KEPT, REDRAWN, MENDED, SMREG, TRIG), COLORS, strict=True))


def prepared(config: Config, report: Callable[[str], None]) -> tuple[Books, dict[str, Any]]:
    texts, origin = read_texts(config.texts, report)
    report("training a vocabulary")
    books = Books.prepare(
        texts, config.held_out, "windows", config.vocab_size, config.length, config.num_valid,
        config.seed,
    )  # fmt: skip
    return books, origin


def started(
    config: Config,
    books: Books,
    start: PerformerForMaskedLM,
    features: Mapping[str, Any],
    omega_seed: int,
) -> PerformerForMaskedLM:
    """A Performer with the weights of `start`, and ω of this seed."""
    with warnings.catch_warnings():
        # That trigonometric features have signs is what is measured here.
        warnings.simplefilter("ignore", UserWarning)
        model = books.build_model(model_fields(config, features), omega_seed)
    transfer_weights(start, model)
    return model


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    books, origin = prepared(config, report)
    valid = scored_batches(books.valid, books.task, 32, config.seed)

    def trained(model: PerformerForMaskedLM, plan: Steps, batch_seed: int) -> dict[str, Any]:
        batches = drawn_batches(books.train, books.task, config.batch_size, batch_seed)
        return train_for_steps(model, batches, valid, plan, books.task.shift)

    def of_variant(name: str, seed: int) -> dict[str, Any]:
        features, decided = VARIANTS[name]
        omega_seed, batch_seed = (seed, config.seed) if decided == "ω" else (config.seed, seed)
        return trained(started(config, books, start, features, omega_seed), plans[name], batch_seed)

    start = books.build_model(model_fields(config, {"attention": "exact"}), config.seed)
    plan = Steps(config.steps, config.evaluations, config.learning_rate, config.warmup_steps)
    redrawn = replace(plan, redraw_every=config.redraw_every)
    plans = dict.fromkeys((KEPT, BATCHES), plan) | dict.fromkeys((REDRAWN, SMREG, TRIG), redrawn)
    plans[MENDED] = replace(redrawn, redraw_from=config.steps // 2)
    pretraining = None
    if config.pretraining_steps:
        report(f"training an exact Transformer for {config.pretraining_steps} steps")
        pretraining = trained(
            start, replace(plan, steps=config.pretraining_steps), config.seed + config.seeds
        )
    rows = []
    with resumable_folder("figure-15", config) as folder:
        for name in VARIANTS:
            report(f"{config.seeds} trainings of {config.steps} steps: {name}")
            for seed in range(config.seed, config.seed + config.seeds):
                found = kept(folder / f"{name}-{seed}.json", partial(of_variant, name, seed))
                rows.append({"name": name, "seed": seed, **found})
    return {
        "rows": rows,
        "pretraining": pretraining,
        "baseline": books.baseline,
        "windows": {"train": len(books.train), "valid": len(books.valid)},
        "texts": origin,
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(11.6, 4.2), layout="constrained")
        luck, means, unstable = drawn.subplots(1, 3)
        lucky, unlucky = _by_luck(results)
        for row in rows_with(results, name=KEPT):
            is_named = row["seed"] in (lucky, unlucky)
            label = {lucky: "lucky ω, kept", unlucky: "unlucky ω, kept"}.get(row["seed"])
            _draw(luck, row, COLORS[0] if row["seed"] != unlucky else COLORS[1], label, is_named)
        mended = next(row for row in rows_with(results, name=MENDED) if row["seed"] == unlucky)
        _draw(luck, mended, LINES[MENDED], "unlucky ω, then redrawn", True)
        luck.axvline(config["steps"] // 2, color="black", linewidth=1)
        for name in (KEPT, REDRAWN, SMREG):
            for row in rows_with(results, name=name):
                label = name if row["seed"] == config["seed"] else None
                _draw(means, row, LINES[name], label, True)
        for name in (REDRAWN, TRIG):
            for row in rows_with(results, name=name):
                steps = [point[0] for point in row["curve"][1:]]
                label = name if row["seed"] == config["seed"] else None
                unstable.plot(steps, row["gradients"], color=LINES[name], marker=".", label=label)
        luck.set(title="Loss: the luck of ω", xlabel="gradient steps")
        means.set(title="Loss: redrawing and SMREG", xlabel="gradient steps")
        unstable.set(title="Largest norm of the gradient", xlabel="gradient steps", yscale="log")
        for axes in (luck, means, unstable):
            axes.legend()
    return drawn


def _draw(axes: Axes, row: dict[str, Any], color: str, label: str | None, is_named: bool) -> None:
    """The losses of a run; faint unless it is one of those that the legend names."""
    points = [(step, loss) for step, _, loss in row["curve"] if loss is not None]
    axes.plot(
        *zip(*points, strict=True), color=color, label=label, marker=".",
        alpha=1.0 if is_named else 0.25,
    )  # fmt: skip


def _losses(results: dict[str, Any], name: str) -> list[float]:
    """At the end, of the runs that came there."""
    return [row["curve"][-1][2] for row in rows_with(results, name=name) if row["stopped"] is None]


def _by_luck(results: dict[str, Any]) -> tuple[int, int]:
    """The seeds of the ω that ends with the least loss, and with the most, where ω is kept."""
    rows = sorted(rows_with(results, name=KEPT), key=lambda row: row["curve"][-1][2] or math.inf)
    return rows[0]["seed"], rows[-1]["seed"]


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    baseline, windows = results["baseline"], results["windows"]
    before = results["pretraining"]
    start = (
        f"All start from an exact Transformer of {config['pretraining_steps']} steps, whose loss "
        f"is {before['curve'][-1][2]:.3f}. "
        if before
        else ""
    )
    parts = [
        f"{start}Losses at {baseline['num_scored']:,} hidden tokens of {windows['valid']} windows "
        f"of the held-out book after {config['steps']} steps; the empirical baseline has "
        f"{baseline['loss']:.3f}.",
        markdown_table(list(_table(results))),
        "\n".join(_findings(results)),
    ]
    return "\n\n".join(parts)


def _table(results: dict[str, Any]) -> Iterator[list[str]]:
    yield [
        "ω", "seeds are of", "loss, ± one standard error", "standard deviation", "least", "most",
        "largest gradient", "ended in NaN",
    ]  # fmt: skip
    for name, (_, decided) in VARIANTS.items():
        rows, losses = rows_with(results, name=name), _losses(results, name)
        largest = max(max(row["gradients"], default=0.0) for row in rows)
        cells = ["–"] * 4
        if losses:
            mean = Mean.of(losses)
            deviation = (mean.error or 0.0) * len(losses) ** 0.5
            cells = [_number(mean), f"{deviation:.4f}", f"{min(losses):.3f}", f"{max(losses):.3f}"]
        yield [name, decided, *cells, f"{largest:.3g}", f"{len(rows) - len(losses)} of {len(rows)}"]


def _number(mean: Mean) -> str:
    return f"{mean.value:.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")


def _findings(results: dict[str, Any]) -> Iterator[str]:
    """What the paper says, beside differences of mean losses."""
    claims = {
        "redrawing lowers the loss": (KEPT, REDRAWN),
        "redrawing from the middle on lowers the loss": (KEPT, MENDED),
        "SMREG has a lower loss than Gaussian features, both redrawn": (REDRAWN, SMREG),
        "trigonometric features end above positive ones, both redrawn": (TRIG, REDRAWN),
    }
    for words, (above, below) in claims.items():
        if _losses(results, above) and _losses(results, below):
            gap = Mean.of(_losses(results, above)) - Mean.of(_losses(results, below))
            yield f"- {words[0].upper()}{words[1:]}: by {_number(gap)}; {gap.is_above_0()}."
