"""Figure 14: how the error of FAVOR+ grows through the layers of a Transformer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor

from performers.models import PerformerForMaskedLM
from performers.reproduction import read_texts, resumable_folder
from performers.reproduction.books import Books, evaluations, model_fields, transfer_weights
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """One model, read after each of its layers; with random weights and with trained ones.

    The paper gives neither sizes nor weights: "paper" is its regular model with twice the layers.
    """

    texts: str = "novels"  # or "excerpts", which are in the repository
    held_out: str = "Persuasion"
    vocab_size: int = 32768
    length: int = 1024
    sequences: int = 4  # that the error is measured on
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_projections: int = 256
    window: int = 3
    draws: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    steps: int = 100_000
    seed: int = 0


PAPER = Config()
REDUCED = replace(
    PAPER, vocab_size=512, length=128, sequences=32, hidden_size=64, num_hidden_layers=6,
    num_attention_heads=4, batch_size=8, learning_rate=3e-3, steps=1500,
)  # fmt: skip
SMOKE = replace(
    REDUCED, texts="excerpts", held_out="persuasion", vocab_size=128, length=32, sequences=2,
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_projections=16, draws=2,
    steps=4,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

AVERAGING = "averaging the values"


def variants(config: Config) -> dict[str, dict[str, Any]]:
    """What is approximated with, by its name."""
    return {
        "FAVOR+": {},
        "FAVOR+, iid": {"projection": "iid"},
        "SMREG": {"distribution": "sphere"},
        "trigonometric": {"attention": "performer-trigonometric"},
        "FAVOR+ with a window": {"window_size": config.window},
    }


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    texts, origin = read_texts(config.texts, report)
    books = Books.prepare(
        texts, config.held_out, "windows", config.vocab_size, config.length, config.sequences,
        config.seed,
    )  # fmt: skip
    tokens = torch.stack([books.valid[i]["input_ids"] for i in range(len(books.valid))])
    panels = {}
    # 0.02 is what most models start from; at 1/√d queries and keys have unit variance.
    for title, initializer_range in (
        ("random weights, deviation 0.02", 0.02),
        ("random weights, deviation 1/√d", config.hidden_size**-0.5),
    ):
        report(title)
        torch.manual_seed(config.seed)
        fields = model_fields(
            config, {"attention": "exact", "initializer_range": initializer_range}
        )
        exact = books.build_model(fields, config.seed)
        panels[title] = _errors(config, books, exact, tokens)
    with resumable_folder("figure-14", config) as folder:
        report(f"training for {config.steps} steps")
        trained = books.train_model(
            folder, model_fields(config, {"attention": "exact"}), _trainer(config), config.seed
        )
        panels["trained weights"] = _errors(config, books, trained.model, tokens)
        _, accuracy, _ = evaluations(trained)[-1]
    return {
        "panels": panels,
        "accuracy": accuracy,
        "baseline": books.baseline["accuracy"],
        "texts": origin,
    }


def _trainer(config: Config) -> dict[str, Any]:
    every = config.steps // 4
    return {
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": config.steps // 20,
        "eval_strategy": "steps",
        "eval_steps": every,
        "logging_steps": every,
        "save_steps": every,
        "disable_tqdm": True,
    }


@torch.no_grad()
def _errors(
    config: Config, books: Books, exact: PerformerForMaskedLM, tokens: Tensor
) -> dict[str, Any]:
    """Relative errors after each layer: of all variants, of one layer alone, of no attention."""
    exact.eval()
    reference = _outputs(exact, tokens)
    propagated: dict[str, list[list[float]]] = {}
    alone: list[list[float]] = []
    for name, variant in variants(config).items():
        propagated[name] = []
        for draw in range(config.draws):
            fields = model_fields(config, {"attention": "performer-positive", **variant})
            performer = books.build_model(fields, config.seed + draw).eval()
            transfer_weights(exact, performer)
            propagated[name].append(_compare(_outputs(performer, tokens), reference))
            if name == "FAVOR+":
                alone.append(_one_layer_at_a_time(exact, performer, tokens, reference))
    averaging = copy.deepcopy(exact)
    for layer in averaging.performer.layers:
        layer.attention.q_proj.weight.zero_()
        layer.attention.q_proj.bias.zero_()
    return {
        "propagated": propagated,
        "one layer alone": alone,
        AVERAGING: _compare(_outputs(averaging, tokens), reference),
    }


def _one_layer_at_a_time(
    exact: PerformerForMaskedLM,
    performer: PerformerForMaskedLM,
    tokens: Tensor,
    reference: list[Tensor],
) -> list[float]:
    """The error after each layer where that layer alone is a Performer's."""
    errors = []
    for index, layer in enumerate(exact.performer.layers):
        own = layer.attention.mechanism
        layer.attention.mechanism = performer.performer.layers[index].attention.mechanism
        errors.append(_compare(_outputs(exact, tokens), reference)[index])
        layer.attention.mechanism = own
    return errors


def _outputs(model: PerformerForMaskedLM, tokens: Tensor) -> list[Tensor]:
    """What the model of the first 1, 2, … layers puts out, with the norm that ends it."""
    states = model(tokens, output_hidden_states=True).hidden_states
    # The last is normalized already.
    return [*(model.performer.norm(state) for state in states[1:-1]), states[-1]]


def _compare(outputs: list[Tensor], reference: list[Tensor]) -> list[float]:
    """‖output − reference‖ / ‖reference‖ after each layer."""
    return [float((o - r).norm() / r.norm()) for o, r in zip(outputs, reference, strict=True)]


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    layers = range(1, config["num_hidden_layers"] + 1)
    with style.context(STYLE):
        drawn = Figure(figsize=(4.2 * len(results["panels"]), 4.8), layout="constrained")
        panels = drawn.subplots(1, len(results["panels"]), squeeze=False)[0]
        for axes, (title, panel) in zip(panels, results["panels"].items(), strict=True):
            for (name, draws), color in zip(panel["propagated"].items(), COLORS, strict=True):
                _band(axes, layers, draws, color=color, label=name)
            _band(
                axes, layers, panel["one layer alone"], color=COLORS[0], linestyle=":",
                label="FAVOR+ in this layer alone",
            )  # fmt: skip
            axes.plot(
                layers, panel[AVERAGING], color=BASELINE_COLOR, linestyle="--", label=AVERAGING
            )
            axes.set(title=title, xlabel="layers", yscale="log")
            axes.set_xticks(list(layers))
        panels[0].set_ylabel("relative error of the output")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=4)
    return drawn


def _band(axes: Any, layers: range, draws: list[list[float]], **line: Any) -> None:
    errors = torch.tensor(draws)
    axes.plot(layers, errors.mean(0), marker="o", markersize=3, **line)
    axes.fill_between(layers, errors.amin(0), errors.amax(0), color=line["color"], alpha=0.12)


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    depth = config["num_hidden_layers"]
    shown = sorted({1, 2, (depth + 1) // 2, depth})
    lines = []
    for title, panel in results["panels"].items():
        rows = {name: _mean(draws) for name, draws in panel["propagated"].items()}
        rows["FAVOR+ in this layer alone"] = _mean(panel["one layer alone"])
        rows[AVERAGING] = panel[AVERAGING]
        lines += [
            f"| {title} | " + " | ".join(f"layers = {k}" for k in shown) + " |",
            "|---|" + "---|" * len(shown),
            *(
                f"| {name} | " + " | ".join(f"{errors[k - 1]:.3g}" for k in shown) + " |"
                for name, errors in rows.items()
            ),
            "",
        ]
    lines += [
        f"‖output − exact‖ / ‖exact‖, mean over {config['draws']} draws of ω. The trained model "
        f"reaches {results['accuracy']:.1%} of the hidden tokens of those sequences; the empirical "
        f"baseline {results['baseline']:.1%}.",
        "",
        "| error of FAVOR+ | " + " | ".join(results["panels"]) + " |",
        "|---|" + "---|" * len(results["panels"]),
    ]
    growth, share = [], []
    for panel in results["panels"].values():
        errors, alone = _mean(panel["propagated"]["FAVOR+"]), _mean(panel["one layer alone"])
        growth.append(f"{errors[-1] / errors[0]:.1f}")
        share.append(f"{errors[-1] / alone[-1]:.1f}")
    lines += [
        f"| after {depth} layers over after one | {' | '.join(growth)} |",
        f"| after {depth} layers over that of the last layer alone | {' | '.join(share)} |",
    ]
    return "\n".join(lines)


def _mean(draws: list[list[float]]) -> list[float]:
    return [sum(errors) / len(errors) for errors in zip(*draws, strict=True)]
