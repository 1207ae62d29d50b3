"""Results as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from performers.records.tables import aligned

__all__ = ["results_table", "scores_table"]


def results_table(metrics: Mapping[str, Any]) -> str:
    """All models of a run beside the empirical baseline, a block per split, and their cost."""
    lines = []
    header = HEADER
    if metrics.get("config", {}).get("data", {}).get("text") is not None:
        header = [*HEADER[:-1], "bits per token"]
    for split, baseline in metrics["baseline"].items():
        rows = [["empirical baseline", *_cells(baseline)]]
        for model in metrics["models"]:
            rows.append([model["attention"], *_cells(model["metrics"][split])])
        lines += [metrics["data"]["splits"][split]["title"], *aligned([header, *rows]), ""]
    rows = [["", "tokens seen", "training time", "peak memory"]]
    for model in metrics["models"]:
        memory = model["peak_memory"]
        rows.append(
            [
                model["attention"],
                f"{model['tokens']:,}",
                f"{model['seconds']:.0f} s",
                "not known" if memory is None else f"{memory / 2**20:,.0f} MiB",
            ]
        )
    return "\n".join([*lines, "Cost of training", *aligned(rows)])


def scores_table(scores: Mapping[str, Any]) -> str:
    """The metrics of one evaluation, one a line."""
    return "\n".join(
        aligned([[name.replace("_", " "), _number(value)] for name, value in scores.items()])
    )


HEADER = ["", "accuracy", "perplexity", "bits per character"]


def _cells(scores: Mapping[str, float]) -> list[str]:
    return [
        f"{scores['accuracy']:.2%}",
        f"{scores['perplexity']:.3f}",
        f"{scores['bits_per_character']:.3f}",
    ]


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
