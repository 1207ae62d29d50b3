"""Figure 7, left: 64 × 64 images byte by byte, Performers against Reformers twice as deep."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor

from performers.models import PerformerConfig, PerformerForImageGeneration
from performers.records import markdown_table
from performers.reproduction import kept, resumable_folder
from performers.reproduction.means import Mean
from performers.reproduction.steps import Batch, Steps, rows_with, train_for_steps
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

from .photographs import Tiles, frequency_bits, marginal_bits, packed, unpacked


@dataclass(frozen=True)
class Config:
    """Tiles of `size` × `size` pixels, of which `num_scored` of other photographs are scored.

    Performers and Reformers have the layers named, all else alike. Every other layer of a Reformer,
    the first included, sees the `local_window` positions before its own, and the rest hash.
    `known_rows`: what completions are given. The paper does not say its batches; 100,000 steps are
    those of its Appendix D.2.
    """

    source: str = "lomiri"
    size: int = 64
    num_held_out: int = 3
    num_scored: int = 256
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_projections: int = 256
    performer_layers: tuple[int, ...] = (6, 12)
    reformer_layers: tuple[int, ...] = (12, 24)
    num_hashes: int = 4
    chunk_size: int = 64
    local_window: int = 64
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant"
    initializer_range: float = 0.02
    redraw_every: int = 1000
    steps: int = 100_000
    evaluations: int = 50
    num_samples: int = 8
    known_rows: int = 32
    seeds: int = 3
    seed: int = 0


PAPER = Config()
REDUCED = replace(
    PAPER, num_scored=8, hidden_size=64, num_attention_heads=2, intermediate_size=128,
    num_projections=32, performer_layers=(1, 2), reformer_layers=(2, 4), num_hashes=1,
    chunk_size=32, batch_size=1, learning_rate=3e-3, warmup_steps=10, schedule="linear",
    initializer_range=0.1, redraw_every=50, steps=300, evaluations=6, num_samples=3,
    known_rows=48, seeds=1,
)  # fmt: skip
SMOKE = replace(
    REDUCED, source="scikit-learn", size=8, num_held_out=1, num_scored=2, hidden_size=16,
    intermediate_size=16, num_projections=8, performer_layers=(1,), reformer_layers=(2,),
    chunk_size=16, warmup_steps=0, redraw_every=1, steps=2, evaluations=1, num_samples=1,
    known_rows=6,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

RELU, SOFTMAX, SMREG, REFORMER = "Performer-ReLU", "Performer-softmax", "SMREG", "Reformer"
LINES = dict(zip((RELU, REFORMER, SOFTMAX, SMREG), COLORS, strict=False))

# Appendix D.2: bits per dimension after 100,000 steps.
THE_PAPERS = {RELU: 3.67, SOFTMAX: 3.69, SMREG: 3.67}


def models(config: Config) -> dict[tuple[str, int], dict[str, Any]]:
    """Fields of `PerformerConfig` by the name of the mechanism and the number of layers."""
    length = 3 * config.size**2
    hashes = {
        "num_hashes": config.num_hashes,
        "chunk_size": config.chunk_size,
        "num_buckets": 2 * (length // (2 * config.chunk_size) // 2),
    }
    sizes = {
        "image_shape": [config.size, config.size, 3],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_projections": config.num_projections,
        "max_position_embeddings": length + 1,
        "initializer_range": config.initializer_range,
        "hidden_dropout_prob": 0.0,
    }
    reformers = {"local": {"window_size": config.local_window}, "reformer": hashes}
    mechanisms: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
        RELU: ({"attention": "performer-relu"}, config.performer_layers),
        SOFTMAX: ({"attention": "performer-positive"}, config.performer_layers),
        SMREG: (
            {"attention": "performer-positive", "distribution": "sphere"},
            config.performer_layers[:1],
        ),
        REFORMER: (
            {"attention": [*reformers], "attention_options": reformers}, config.reformer_layers,
        ),
    }  # fmt: skip
    return {
        (name, layers): {**sizes, **_deepened(mechanism, layers)}
        for name, (mechanism, depths) in mechanisms.items()
        for layers in depths
    }


def _deepened(mechanism: dict[str, Any], layers: int) -> dict[str, Any]:
    """The mechanism in so many layers, again from the first where it has one for each of some."""
    attention = mechanism["attention"]
    if isinstance(attention, list):
        attention = [attention[layer % len(attention)] for layer in range(layers)]
    return {**mechanism, "attention": attention, "num_hidden_layers": layers}


def build(fields: dict[str, Any], seed: int) -> PerformerForImageGeneration:
    torch.manual_seed(seed)
    return PerformerForImageGeneration(PerformerConfig(**fields, seed=seed, is_decoder=True))


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    images = Tiles.read(config.source, config.size, config.num_held_out, config.seed, report)
    valid = images.valid[: config.num_scored]

    def trained(fields: dict[str, Any], seed: int, is_artist: bool) -> dict[str, Any]:
        model = build(fields, seed)
        began = time.process_time()
        found = train_for_steps(
            model, partial(_batch, model, images.train, config.batch_size, seed),
            [_tokens(model, image[None]) for image in valid], _plan(config), shift=True,
        )  # fmt: skip
        found["processor_seconds"] = time.process_time() - began
        if is_artist:
            report(f"drawing {2 * config.num_samples} images")
            found["drawn"] = _drawn(model, valid[: config.num_samples], config)
        return found

    rows = []
    with resumable_folder("figure-7-left", config) as folder:
        for seed in range(config.seed, config.seed + config.seeds):
            for (name, layers), fields in models(config).items():
                report(f"seed {seed}, {config.steps} steps: {name}, {_layers(layers)}")
                # One model is enough to look at.
                is_artist = (name, layers, seed) == (RELU, config.performer_layers[0], config.seed)
                path = folder / str(seed) / f"{name}-{layers}.json"
                found = kept(path, partial(trained, fields, seed, is_artist))
                rows.append({"mechanism": name, "layers": layers, "seed": seed, **found})
    return {
        "rows": rows,
        "marginal_bits": marginal_bits(valid),
        "frequency_bits": frequency_bits(images.train, valid, is_after=False),
        "frequency_after_bits": frequency_bits(images.train, valid, is_after=True),
        "photographs": images.photographs,
        "tiles": {"train": len(images.train), "valid": len(images.valid), "scored": len(valid)},
        "origin": images.origin,
    }


def _plan(config: Config) -> Steps:
    return Steps(
        config.steps, config.evaluations, config.learning_rate, config.warmup_steps,
        config.schedule, redraw_every=config.redraw_every,
    )  # fmt: skip


def _tokens(model: PerformerForImageGeneration, images: Tensor) -> Batch:
    tokens = model.tokens(images)
    return {"input_ids": tokens, "labels": tokens}


def _batch(
    model: PerformerForImageGeneration, images: Tensor, size: int, seed: int, step: int
) -> Batch:
    """Tiles drawn at random, the same at every step for the same seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return _tokens(model, images[torch.randint(len(images), (size,), generator=generator)])


def _drawn(model: PerformerForImageGeneration, real: Tensor, config: Config) -> dict[str, str]:
    """Real tiles, the same with their lower rows drawn by the model, and tiles all its own."""
    model.eval()
    torch.manual_seed(config.seed)
    pictures = {
        "real": real,
        "completed": model.complete(real[:, : config.known_rows]),
        "sampled": model.complete(real[:, :0]),
    }
    return {name: packed(images) for name, images in pictures.items()}


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    pictures = next(row["drawn"] for row in results["rows"] if "drawn" in row)
    with style.context(STYLE):
        drawn = Figure(figsize=(10.4, 4.8), layout="constrained")
        left, right = drawn.subfigures(1, 2, width_ratios=(1.5, 1.0))
        axes = left.subplots()
        depths = {
            name: sorted({row["layers"] for row in results["rows"] if row["mechanism"] == name})
            for name in LINES
        }
        for row in results["rows"]:
            name, layers = row["mechanism"], row["layers"]
            steps, _, losses = zip(*row["curve"], strict=True)
            axes.plot(
                steps, [math.nan if loss is None else loss / math.log(2) for loss in losses],
                "--" if layers == depths[name][0] and len(depths[name]) > 1 else "-",
                color=LINES[name], marker=".",
                label=f"{name}, {_layers(layers)}" if row["seed"] == config["seed"] else None,
            )  # fmt: skip
        axes.axhline(
            results["marginal_bits"], color=BASELINE_COLOR, linestyle=":", label="marginal entropy"
        )
        axes.set(title="Bits per dimension, validation", xlabel="gradient steps")
        left.legend(loc="outside lower center", ncols=3, fontsize=8)
        grid = right.subplots(len(pictures), config["num_samples"], squeeze=False)
        for line, (name, text) in zip(grid, pictures.items(), strict=True):
            shape = (config["num_samples"], config["size"], config["size"], 3)
            for panel, image in zip(line, unpacked(text, shape), strict=True):
                panel.imshow(image)
                panel.set(xticks=[], yticks=[])
                panel.grid(visible=False)
            line[0].set_title(TITLES[name].format(rows=config["known_rows"]))
    return drawn


TITLES = {
    "real": "photographs held out",
    "completed": "below row {rows}: the model's",
    "sampled": "all the model's",
}


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    counts, marginal = results["tiles"], results["marginal_bits"]
    held_out = ", ".join(results["photographs"]["valid"])
    parts = [
        f"{config['steps']} steps, each of {config['batch_size']} of {counts['train']:,} tiles; "
        f"scored on {counts['scored']} of {counts['valid']:,} tiles of the photographs {held_out}. "
        + ("± is one standard error over seeds." if config["seeds"] > 1 else "One seed.")
        + f" The marginal entropy of the bytes that are scored is {marginal:.2f} bits. Predicted "
        "by how often each is in the photographs that are trained on they have "
        f"{results['frequency_bits']:.2f} bits, and by how often it is there after the byte "
        f"before it {results['frequency_after_bits']:.2f}.",
        markdown_table(list(_table(results))),
        "\n".join(_findings(config, results)),
    ]
    return "\n\n".join(parts)


def _bits(results: dict[str, Any]) -> dict[tuple[str, int], Mean]:
    """Bits per dimension at the end, of the runs that came there; means over seeds."""
    ends: dict[tuple[str, int], list[float]] = {}
    for row in results["rows"]:
        if row["stopped"] is None:
            key = row["mechanism"], row["layers"]
            ends.setdefault(key, []).append(row["curve"][-1][2] / math.log(2))
    return {key: Mean.of(found) for key, found in ends.items()}


def _table(results: dict[str, Any]) -> Iterator[list[str]]:
    yield [
        "model", "layers", "bits per dimension", "below the marginal entropy", "weights",
        "seconds of the processor",
    ]  # fmt: skip
    for (name, layers), bits in _bits(results).items():
        runs = rows_with(results, mechanism=name, layers=layers)
        seconds = Mean.of([row["processor_seconds"] for row in runs]).value
        yield [
            name, str(layers), bits.number(), f"{results['marginal_bits'] - bits.value:.2f}",
            f"{runs[0]['parameters']:,}", f"{seconds:.0f}",
        ]  # fmt: skip


def _findings(config: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """The paper's claims, beside differences found here."""
    bits = _bits(results)
    pairs = zip(config["performer_layers"], config["reformer_layers"], strict=True)
    for ours, theirs in pairs:
        if (RELU, ours) in bits and (REFORMER, theirs) in bits:
            gap = bits[RELU, ours] - bits[REFORMER, theirs]
            yield (
                f"- A Performer of {_layers(ours)} matches a Reformer of {theirs} (the paper: "
                f"of 6 and 12, of 12 and 24): it has {gap.number()} bits more."
            )
    depth = config["performer_layers"][0]
    if (RELU, depth) in bits:
        for name in (SOFTMAX, SMREG):
            if (name, depth) in bits:
                gap = bits[name, depth] - bits[RELU, depth]
                yield (
                    f"- {name} is as good as Performer-ReLU (the paper: {THE_PAPERS[name]} and "
                    f"{THE_PAPERS[RELU]} bits): with {_layers(depth)} it has {gap.number()} bits "
                    "more."
                )
