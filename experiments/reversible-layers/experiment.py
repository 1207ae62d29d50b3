"""Peak memory of a training step against the number of layers, with and without reversible ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.records import markdown_table
from performers.speed import peak_of_step
from performers.viz.figures import COLORS, STYLE

KINDS = {"plain": False, "reversible": True}


@dataclass(frozen=True)
class Model:
    """Fields of a `PerformerConfig`; the others are those of a new one."""

    attention: str = "performer-relu"
    hidden_size: int = 512
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    num_projections: int = 256


@dataclass(frozen=True)
class Config:
    layers: tuple[int, ...] = (2, 8, 32)
    length: int = 8192
    batch: int = 1
    model: Model = Model()
    device: str = "cpu"
    seed: int = 0


PAPER = replace(Config(), device="cuda" if torch.cuda.is_available() else "cpu")
SMALL = Model(hidden_size=128, num_attention_heads=2, intermediate_size=512, num_projections=64)
REDUCED = replace(Config(), model=SMALL)
SMOKE = replace(REDUCED, layers=(2,), length=16)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    rows = []
    for layers in config.layers:
        for kind, is_reversible in KINDS.items():
            report(f"{layers} layers, {kind}")
            fields = {
                **asdict(config.model),
                "num_hidden_layers": layers,
                "reversible": is_reversible,
                "vocab_size": PerformerConfig.vocab_size,
                "seed": config.seed,
            }
            peak = peak_of_step(fields, config.length, config.batch, torch.device(config.device))
            weights = _bytes_of_weights(fields)
            rows.append({"layers": layers, "kind": kind, "peak": peak, "weights": weights})
    return {"rows": rows}


def _bytes_of_weights(fields: dict[str, Any]) -> int:
    with torch.device("meta"):
        model = PerformerForMaskedLM(PerformerConfig(**fields))
    return sum(weight.nbytes for weight in model.parameters())


def _beyond(row: dict[str, Any]) -> float | None:
    """MiB beyond the weights and their gradients."""
    if not isinstance(row["peak"], int):
        return None
    return float(row["peak"] - 2 * row["weights"]) / 2**20


def _of_kind(results: dict[str, Any], kind: str) -> dict[int, float | None]:
    return {row["layers"]: _beyond(row) for row in results["rows"] if row["kind"] == kind}


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with rc_context(STYLE):
        drawn = Figure(figsize=(6.0, 3.8), layout="constrained")
        axes = drawn.subplots()
        for kind, color in zip(KINDS, COLORS, strict=False):
            known = {n: size for n, size in _of_kind(results, kind).items() if size is not None}
            axes.plot(list(known), list(known.values()), marker="o", color=color, label=kind)
        axes.set_xscale("log", base=2)
        axes.set_xticks(config["layers"], [str(layers) for layers in config["layers"]])
        axes.set(
            yscale="log",
            xlabel="layers",
            ylabel="MiB beyond weights and gradients",
            title=f"a training step at L = {config['length']:,}",
        )
        axes.legend()
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    fewest = config["layers"][0]
    kinds = {kind: _of_kind(results, kind) for kind in KINDS}
    header = ["layers"]
    for kind in KINDS:
        header += [f"{kind}, MiB", f"÷ that of {fewest} layers"]
    lines = [header]
    for layers in config["layers"]:
        cells = []
        for sizes in kinds.values():
            size, first = sizes[layers], sizes[fewest]
            cells.append("not known" if size is None else f"{size:,.0f}")
            cells.append("" if not size or not first else f"{size / first:.2f}")
        lines.append([str(layers), *cells])
    return markdown_table(lines)
