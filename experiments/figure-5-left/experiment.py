"""Figure 5, left: the weights of a trained Transformer go into a Performer, which is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from performers.models import PerformerForMaskedLM
from performers.reproduction import read_texts, resumable_folder
from performers.reproduction.books import Books, evaluations, model_fields
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """Masked language modeling of sentences; the Transformer first, then each Performer.

    The paper gives neither size nor steps of its LM1B model: "paper" is its regular model.
    """

    texts: str = "novels"  # or "excerpts", which are in the repository
    held_out: str = "Persuasion"
    vocab_size: int = 32768
    length: int = 256
    num_valid: int = 2048
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_projections: int = 256
    window: int = 3  # blocks of it and neighbors, scored exactly in one of the Performers
    batch_size: int = 256
    learning_rate: float = 1e-3
    fine_tuning_rate: float = 5e-4
    warmup_steps: int = 1000
    steps: int = 100_000
    fine_tuning_steps: int = 10_000
    evaluations: int = 10
    seed: int = 0


PAPER = Config()
REDUCED = replace(
    PAPER, vocab_size=512, length=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    batch_size=16, learning_rate=3e-3, fine_tuning_rate=1e-3, warmup_steps=50, steps=5000,
    fine_tuning_steps=500, evaluations=5,
)  # fmt: skip
SMOKE = replace(
    REDUCED, texts="excerpts", held_out="persuasion", vocab_size=128, length=32, num_valid=64,
    hidden_size=16, num_attention_heads=2, num_projections=16, warmup_steps=2, steps=40,
    fine_tuning_steps=4, evaluations=2,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

TRANSFORMER, CONTROL = "Transformer", "exact attention, trained on"


def fine_tuned(config: Config) -> dict[str, dict[str, Any]]:
    """What the weights go into, by its name."""
    favor = {"attention": "performer-positive"}
    return {
        CONTROL: {"attention": "exact"},
        "FAVOR+": favor,
        "sharp": {"attention": "performer-sharp"},
        "trigonometric": {"attention": "performer-trigonometric"},
        "FAVOR+ with a window": {**favor, "window_size": config.window},
    }


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    texts, origin = read_texts(config.texts, report)
    books = Books.prepare(
        texts, config.held_out, "sentences", config.vocab_size, config.length, config.num_valid,
        config.seed,
    )  # fmt: skip
    curves = {}
    with resumable_folder("figure-5-left", config) as folder:
        report(f"training the Transformer for {config.steps} steps")
        exact = books.train_model(
            folder / "exact", model_fields(config, {"attention": "exact"}),
            _trainer(config, config.steps, config.learning_rate), config.seed,
        )  # fmt: skip
        curves[TRANSFORMER] = evaluations(exact)
        near = _share_of_near_keys(exact.model, books, config.window)
        for index, (name, mechanism) in enumerate(fine_tuned(config).items()):
            report(f"fine-tuning for {config.fine_tuning_steps} steps: {name}")
            # Another seed, so that the sentences come in another order.
            trained = books.train_model(
                folder / f"performer-{index}",
                model_fields(config, mechanism),
                _trainer(config, config.fine_tuning_steps, config.fine_tuning_rate),
                config.seed + 1,
                start_from=exact.model,
            )
            curves[name] = evaluations(trained)
    return {
        "curves": curves,
        "baseline": books.baseline["accuracy"],
        "scored": books.baseline["num_scored"],
        "share_of_near_keys": near,
        "sentences": {"train": len(books.train), "valid": len(books.valid)},
        "texts": origin,
    }


def _trainer(config: Config, steps: int, learning_rate: float) -> dict[str, Any]:
    every = steps // config.evaluations
    return {
        "max_steps": steps,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": 64,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": learning_rate,
        # Down to 0 in both trainings, so that the end of neither is lowered by noise.
        "lr_scheduler_type": "linear",
        "warmup_steps": min(config.warmup_steps, steps // 10),
        "eval_strategy": "steps",
        "eval_on_start": True,
        "eval_steps": every,
        "logging_steps": every,
        "save_steps": every,
        "disable_tqdm": True,
    }


@torch.no_grad()
def _share_of_near_keys(model: PerformerForMaskedLM, books: Books, window: int) -> list[float]:
    """Of each layer: how much of its attention goes to |i − j| < window, and were it even."""
    rows = [books.valid[index] for index in range(len(books.valid))][:64]
    batch = books.task.evaluation_collator(0)(rows)
    mask = batch["attention_mask"]
    model.eval()
    outputs = model(batch["input_ids"], attention_mask=mask, output_attentions=True)
    position = torch.arange(mask.shape[1])
    is_near = (position[:, None] - position).abs() < window
    shares = [
        float(((matrix * is_near).sum(-1) * mask[:, None]).sum() / (matrix.shape[1] * mask.sum()))
        for matrix in outputs.attentions
    ]
    even = (is_near * mask[:, None]).sum(-1) / mask.sum(-1, keepdim=True)
    return [*shares, float((even * mask).sum() / mask.sum())]


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(10.4, 4.9), layout="constrained")
        whole, beginning = drawn.subplots(1, 2, sharey=True)
        curves = results["curves"]
        for axes in (whole, beginning):
            for (name, curve), color in zip(curves.items(), ("black", *COLORS), strict=False):
                if name == TRANSFORMER and axes is beginning:
                    axes.axhline(curve[-1][1], color="black", label="Transformer (right: its end)")
                    continue
                if name == CONTROL and axes is whole:
                    continue
                steps, accuracies, _ = zip(*curve, strict=True)
                axes.plot(steps, accuracies, color=color, marker="o", markersize=3, label=name)
            axes.axhline(
                results["baseline"], color=BASELINE_COLOR, linestyle="--",
                label="empirical baseline",
            )  # fmt: skip
            axes.set_xlabel("gradient steps")
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        whole.set(title="Training, and fine-tuning the Performers", ylabel="accuracy at masks")
        beginning.set_title("Fine-tuning alone")
        handles, labels = beginning.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    curves, baseline = results["curves"], results["baseline"]
    reached = curves[TRANSFORMER][-1][1]
    steps, all_steps = config["fine_tuning_steps"], config["steps"]
    lines = [
        f"| | at step 0 | after {steps} steps | below the Transformer's |",
        "|---|---|---|---|",
        f"| empirical baseline | {baseline:.1%} | | |",
        f"| Transformer, {all_steps} steps | {curves[TRANSFORMER][0][1]:.1%} | "
        f"{reached:.1%} (at its end) | |",
        *(
            f"| {name} | {curve[0][1]:.1%} | {curve[-1][1]:.1%} | "
            f"{100 * (reached - curve[-1][1]):+.1f} points |"
            for name, curve in curves.items()
            if name != TRANSFORMER
        ),
        "",
        f"Accuracy at {results['scored']:,} hidden tokens of {results['sentences']['valid']:,} "
        f"sentences of the held-out book; one standard error is about "
        f"{100 * (reached * (1 - reached) / results['scored']) ** 0.5:.1f} points, of a difference "
        "on the same tokens less.",
        "",
    ]
    performers = {n: curve for n, curve in curves.items() if n not in (TRANSFORMER, CONTROL)}
    rows = {
        "above chance without training": [baseline < curve[0][1] for curve in performers.values()],
        "below the Transformer without training": [
            curve[0][1] < reached for curve in performers.values()
        ],
        f"within 1 point after {steps / all_steps:.0%} of the steps": [
            reached - curve[-1][1] < 0.01 for curve in performers.values()
        ],
    }
    lines += [
        f"| the paper | {' | '.join(performers)} |",
        f"|---|{'---|' * len(performers)}",
    ]
    lines += [
        f"| {claim} | {' | '.join('yes' if holds else 'no' for holds in found)} |"
        for claim, found in rows.items()
    ]
    *near, even = results["share_of_near_keys"]
    lines += [
        "",
        f"The Transformer gives {', '.join(f'{share:.0%}' for share in near)} of its attention "
        f"(layer by layer) to the {2 * config['window'] - 1} positions with |i − j| < "
        f"{config['window']}; evenly spread it would be {even:.0%}.",
    ]
    return "\n".join(lines)
