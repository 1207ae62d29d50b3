"""Pretrained models before and after recovery: how near they are to the exact ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure

from performers.convert.options import FavorOptions
from performers.records import markdown_table
from performers.reproduction import read_texts, resumable_folder
from performers.train.conversion_config import REPORT, ConversionConfig
from performers.train.conversion_run import Conversion
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

from . import models

__all__ = ["CONFIGS", "figure", "run", "summary"]


@dataclass(frozen=True)
class Config:
    """Each model is converted, all of its layers, and trained to do again what it did exactly.

    `models`: names in `models.MODELS`. By model: `lengths` of sequences, `windows` of near fields,
    numbers of `heavy` keys (0: what is far is chosen by measuring), `batch_sizes`, and steps of
    attention transfer and of fine-tuning.
    """

    models: tuple[str, ...] = ("smollm2", "minilm", "albert")
    texts: str = "novels"
    held_out: str = "Persuasion"
    characters: int = 1_600_000
    lengths: tuple[int, ...] = (2048, 512, 512)
    windows: tuple[int, ...] = (128, 32, 32)
    heavy: tuple[int, ...] = (64, 0, 0)
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    transfer_steps: tuple[int, ...] = (0, 200, 200)
    steps: tuple[int, ...] = (400, 400, 400)
    learning_rates: tuple[float, ...] = (2e-5, 2e-5, 1e-4)
    threads: int = 2
    seed: int = 0


FULL = Config()
REDUCED = replace(FULL, transfer_steps=(0, 40, 40), steps=(32, 60, 60))
SMOKE = replace(
    FULL, models=("random",), texts="excerpts", held_out="persuasion", lengths=(48,), windows=(8,),
    heavy=(4,), batch_sizes=(2,), transfer_steps=(1,), steps=(2,), learning_rates=(1e-3,),
    threads=1,
)  # fmt: skip
# The sizes are not the paper's, which has no such experiment: "paper" is the whole table.
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": FULL}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    books, origin = read_texts(config.texts, report)
    others = "\n\n".join(text for title, text in books.items() if title != config.held_out)
    # What is measured on is the end of the text, and by another book than what is trained on.
    novels = f"{others[: config.characters]}\n\n{books[config.held_out]}"
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with resumable_folder("recovery", config) as folder:
            return {
                "origin": origin,
                "conversions": {
                    name: _converted(config, number, folder / name, novels, report)
                    for number, name in enumerate(config.models)
                },
            }
    finally:
        torch.set_num_threads(threads)


def _converted(
    config: Config, number: int, folder: Path, novels: str, report: Callable[[str], None]
) -> dict[str, Any]:
    """What `performers convert` writes about one model."""
    title, text_format, prepare = models.MODELS[config.models[number]]
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    if not (folder / "model" / "config.json").exists():
        report(f"{title}: the exact model")
        text.write_text(prepare(folder / "model", novels, report), encoding="utf-8")
    heavy = config.heavy[number]
    near = {"window_size": config.windows[number], "num_projections": 64, "seed": config.seed}
    far = {"far": False, "num_heavy": heavy, "num_sinks": 4} if heavy else {}
    wanted = ConversionConfig(
        model=str(folder / "model"),
        text=str(text),
        text_format=text_format,
        options=FavorOptions(**near, **far),
        length=config.lengths[number],
        batch_size=config.batch_sizes[number],
        transfer_steps=config.transfer_steps[number],
        steps=config.steps[number],
        learning_rate=config.learning_rates[number],
        seed=config.seed,
    )
    place = folder / "converted"
    if not (place / REPORT).exists():
        conversion = Conversion.prepare(wanted, place, resume=True)
        conversion.run(lambda line: report(f"{title}: {line}"))
    found = json.loads((place / REPORT).read_text(encoding="utf-8"))
    kept = (
        "options", "sequences", "num_sinks", "far_field", "exact_task_loss", "stages", "seconds",
    )  # fmt: skip
    return {"title": title, **{name: found[name] for name in kept}}


def summary(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Fidelity first, the loss of the model's own task second."""
    rows = [["model", "far keys", "stage", "distance", "the rest", "perplexity ÷ exact", "kept"]]
    for found in results["conversions"].values():
        options = found["options"]
        for stage, one in found["stages"].items():
            fidelity, loss = one["fidelity"], one["task_loss"]
            rows.append(
                [
                    found["title"],
                    _far(options),
                    stage,
                    f"{fidelity['distance']:.4f}",
                    _beside(fidelity),
                    "" if loss is None else f"{math.exp(loss - found['exact_task_loss']):.3f}",
                    "yes" if one["is_kept"] else "undone",
                ]
            )
    ends = [
        f"{found['title']}: {found['seconds'] / 60:.0f} min on {config['threads']} threads"
        for found in results["conversions"].values()
    ]
    return f"{markdown_table(rows)}\n\nThe whole conversion took, {'; '.join(ends)}."


def _far(options: Mapping[str, Any]) -> str:
    if options["far"] is False:
        heavy = options["num_heavy"]
        return f"{heavy} heavy keys" if heavy else "left out"
    return "estimated" if options["far_limit"] is None else "estimated, limited"


def _beside(fidelity: Mapping[str, Any]) -> str:
    if fidelity["agreement"] is not None:
        return f"the same token {fidelity['agreement']:.1%}"
    kept = fidelity["neighbors"]
    return "" if kept is None else f"nearest neighbor kept {kept:.0%}"


def figure(config: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    conversions = results["conversions"]
    with style.context(STYLE):
        drawn = Figure(figsize=(9.0, 3.2), layout="constrained")
        panels = drawn.subplots(1, len(conversions), squeeze=False)[0]
        for axes, found in zip(panels, conversions.values(), strict=True):
            stages = found["stages"]
            colors = [COLORS[0] if one["is_kept"] else BASELINE_COLOR for one in stages.values()]
            distances = [one["fidelity"]["distance"] for one in stages.values()]
            names = [stage.removeprefix("after ").replace(" ", "\n") for stage in stages]
            axes.bar(names, distances, color=colors)
            is_language = next(iter(stages.values()))["fidelity"]["agreement"] is not None
            axes.set(
                title=found["title"],
                ylabel="KL to the exact model" if is_language else "1 − cosine to the exact",
            )
    return drawn
