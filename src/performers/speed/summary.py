"""The results of a benchmark in words, and from which length on each setting is faster."""

from __future__ import annotations

import math
from typing import Any

from performers.speed.timing import PARTS

__all__ = ["crossover", "decoding_line", "memory_line", "model_line", "time_lines", "wins_from"]


def crossover(
    rows: list[dict[str, Any]], setting: str, dtype: str, causal: bool, part: str
) -> float | None:
    """The length from which a setting is faster than exact attention, between the measured ones.

    None if exact attention still wins at the greatest length; the least length if it never does.
    """
    points = []
    for row in rows:
        exact, ours = (row["seconds"][name][part] for name in ("exact", setting))
        if (row["dtype"], row["causal"]) == (dtype, causal) and isinstance(ours, dict):
            ratio = math.log(ours["median"] / exact["median"]) if isinstance(exact, dict) else -1.0
            points.append((row["length"], ratio))
    if not points or points[-1][1] >= 0:
        return None
    last_loss = max((i for i, (_, ratio) in enumerate(points) if ratio >= 0), default=None)
    if last_loss is None:
        return float(points[0][0])
    (left, worse), (right, better) = points[last_loss : last_loss + 2]
    return float(left * (right / left) ** (worse / (worse - better)))


def wins_from(rows: list[dict[str, Any]], setting: str, dtype: str, causal: bool, part: str) -> str:
    """`crossover` in words; "≤" the least and ">" the greatest length that was measured."""
    lengths = [row["length"] for row in rows if (row["dtype"], row["causal"]) == (dtype, causal)]
    length = crossover(rows, setting, dtype, causal, part)
    if length is None:
        return f"> {max(lengths):,}"
    return f"≤ {length:,.0f}" if length == min(lengths) else f"{float(f'{length:.2g}'):,.0f}"


def time_lines(row: dict[str, Any], peers: dict[str, list[str]]) -> str:
    """A length for a person: a line for exact attention, and one for each setting beside it.

    `peers`: of each setting what it is compared with, besides exact attention.
    """
    lines = [f"{_mode(row)}, {row['dtype']}, L = {row['length']:,}"]
    for name, floors in row["floor_seconds"].items():
        others = ["exact", *peers[name]] if name in peers else []
        cells = []
        for part in PARTS:
            ours = row["seconds"][name][part]
            words = part.replace("_", " + ")
            if isinstance(ours, str):
                cells.append(f"{words} {ours}")
                continue
            cells.append(f"{words} {ours['median'] * 1e3:9.2f} ms")
            for other in others:
                theirs = row["seconds"].get(other, {}).get(part)
                if isinstance(theirs, dict):
                    cells.append(f"{ours['median'] / theirs['median']:6.3f} × {other}")
            cells.append(f"{floors[part] / ours['median']:4.0%} of the floor")
        lines.append(f"    {name:16} {'  '.join(cells)}")
    return "\n".join(lines)


def memory_line(row: dict[str, Any]) -> str:
    """Peak memory of a training step, for a person."""
    sizes = ", ".join(
        f"{name} {size / 2**20:,.0f} MiB" if isinstance(size, int) else f"{name} {size}"
        for name, size in row["peak_bytes"].items()
    )
    return f"memory of a training step, {_mode(row)}, L = {row['length']:,}: {sizes}"


def model_line(row: dict[str, Any]) -> str:
    """Time of a model's training step in units of the identity's, for a person."""
    both = {name: parts["forward_backward"] for name, parts in row["seconds"].items()}
    floor = both["identity"]
    ratios = ", ".join(
        f"{name} {seconds['median'] / floor['median']:.2f}"
        if isinstance(seconds, dict) and isinstance(floor, dict)
        else f"{name} {seconds}"
        for name, seconds in both.items()
    )
    return f"training step of a model ÷ identity's, {_mode(row)}, L = {row['length']:,}: {ratios}"


def decoding_line(row: dict[str, Any]) -> str:
    """Tokens per second after a context, for a person."""
    cells = []
    for name, seconds in row["seconds"].items():
        size = row["bytes"][name]
        if isinstance(seconds, str):
            cells.append(f"{name} {seconds}")
        else:
            cells.append(f"{name} {1 / seconds['median']:,.0f} tokens/s, {size / 2**20:,.1f} MiB")
    return f"decoding after {row['context']:9,d} tokens: {'; '.join(cells)}"


def _mode(row: dict[str, Any]) -> str:
    return "causal" if row["causal"] else "bidirectional"
