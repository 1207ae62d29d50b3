"""The figure and the tables of the experiment, from its numbers alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.records import markdown_table
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

__all__ = ["figure", "summary"]

# What the encoder must reach: agreement at least, and word errors at most.
AGREEMENT, WORD_ERROR = 0.97, 0.08


def _positions(results: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """By method, the means over books between every two edges."""
    books = [book["positions"] for book in results["read"]]
    return {
        title: [
            {name: _mean([of[name] for of in parts]) for name in parts[0]}
            for parts in zip(*(book[title] for book in books), strict=True)
        ]
        for title in books[0]
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _speech(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for every setting of the encoder, the exact one first; times are those of it."""
    heard, seconds = results["speech"]["heard"], results["speech"]["seconds"]
    exact = next(iter(seconds.values()))["median"]
    return [
        {
            "title": title,
            "time": seconds[title]["median"] / exact,
            **{name: _mean([one[name] for one in rows]) for name in ("agreement", "word_error")},
        }
        for title, rows in heard.items()
    ]


def _chosen(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the settings of the encoder that reach what they must, the fastest."""
    _, *rows = _speech(results)
    good = [
        row
        for row in rows
        if row["agreement"] >= AGREEMENT and row["word_error"] <= WORD_ERROR and row["time"] < 1
    ]
    return min(good, key=lambda row: row["time"], default=None)


def summary(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    parts = [
        _perplexity_table(config, results),
        _retrieval_table(config, results),
        *_generation(config, results),
        *_speech_part(results),
    ]
    return "\n\n".join(parts)


def _perplexity_table(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    exact, *others = found = _positions(results)
    header = ["positions", f"{exact}: perplexity"]
    for title in others:
        header += [f"{title}: × exact", "KL", "same token"]
    rows = [header]
    for number, (first, last) in enumerate(pairwise(config["edges"])):
        of_exact = found[exact][number]
        row = [f"{first:,} to {last:,}", f"{math.exp(of_exact['loss']):.1f}"]
        for title in others:
            part = found[title][number]
            row += [
                f"{math.exp(part['loss'] - of_exact['loss']):.3f}",
                f"{part['distance']:.3f}",
                f"{part['agreement']:.1%}",
            ]
        rows.append(row)
    books = ", ".join(config["books"])
    return f"**By position**, from the beginning of {books}:\n\n{markdown_table(rows)}"


def _retrieval_table(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    found = results["retrieval"]
    rows = [["tokens between", *found]]
    for number, distance in enumerate(config["distances"]):
        row = [f"{distance:,}"]
        for shares in found.values():
            digits = shares[number]
            whole = sum(share == 1 for share in digits)
            row.append(f"{whole} of {len(digits)}, digits {_mean(digits):.0%}")
        rows.append(row)
    return f"**A pass key** of five digits in a novel, asked for later:\n\n{markdown_table(rows)}"


def _generation(config: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    continued = results["read"][0]["continued"]
    exact = next(iter(continued.values()))["seconds_per_token"]["median"]
    rows = [["", "prompt", "per token", "quartiles", "exact ÷ this", "cache", "in the end"]]
    for title, found in continued.items():
        seconds = found["seconds_per_token"]
        quartiles = " to ".join(
            f"{seconds[name] * 1e3:.0f}" for name in ("lower_quartile", "upper_quartile")
        )
        sizes = [found[name] / 2**20 for name in ("bytes_after_reading", "bytes_in_the_end")]
        rows.append(
            [
                title,
                f"{found['seconds_to_read']:.1f} s",
                f"{seconds['median'] * 1e3:.0f} ms",
                f"{quartiles} ms",
                f"{exact / seconds['median']:.2f}",
                *(f"{size:.1f} MiB" for size in sizes),
            ]
        )
    texts = [f"{title}:\n\n{_quoted(found['text'])}" for title, found in continued.items()]
    return [
        f"**Generation** of {config['new_tokens']} tokens, greedily, behind the first "
        f"{config['length']:,} of {config['books'][0]}:\n\n{markdown_table(rows)}",
        *texts,
    ]


def _quoted(text: str) -> str:
    lines = [textwrap.fill(line, 98, break_on_hyphens=False) for line in text.splitlines()]
    return "```text\n" + "\n".join(lines).replace("`", "'").strip("\n") + "\n```"


def _speech_part(results: Mapping[str, Any]) -> list[str]:
    exact, *others = rows = _speech(results)
    header = ["encoder", "time ÷ exact", "agreement", "word error"]
    table = [header]
    table += [
        [row["title"], f"{row['time']:.2f}", f"{row['agreement']:.1%}", f"{row['word_error']:.3f}"]
        for row in rows
    ]
    heard = results["speech"]["heard"]
    seconds = results["speech"]["seconds"][exact["title"]]["median"]
    chosen = _chosen(results)
    found = (
        "No setting is fast and near enough."
        if chosen is None
        else f"The fastest with an agreement of at least {AGREEMENT} and a word error of at most "
        f"{WORD_ERROR} is **{chosen['title']}**."
    )
    shown = [exact["title"], chosen["title"] if chosen else others[-1]["title"]]
    texts = [f"{title}:\n\n{_quoted(heard[title][0]['text'])}" for title in shown]
    return [
        f"**Speech**, {len(heard[exact['title']])} inputs; exact: {seconds:.2f} s\n\n"
        f"{markdown_table(table)}\n\n{found} The first input:",
        *texts,
    ]


def figure(config: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(10.0, 7.6), layout="constrained")
        by_position, by_distance, by_token, by_time = drawn.subplots(2, 2).flat
        positions = _positions(results)
        colors = dict(zip(positions, (BASELINE_COLOR, *COLORS), strict=False))
        exact = next(iter(positions))
        ends = config["edges"][1:]
        for title, color in colors.items():
            ratios = [
                math.exp(ours["loss"] - theirs["loss"])
                for ours, theirs in zip(positions[title], positions[exact], strict=True)
            ]
            by_position.plot(ends, ratios, color=color, marker="o", markersize=4, label=title)
            shares = [_mean(digits) for digits in results["retrieval"][title]]
            by_distance.plot(config["distances"], shares, color=color, marker="o", markersize=4)
        by_position.set(title="Perplexity ÷ exact", xlabel="positions up to")
        by_distance.set(
            title="Digits of a pass key found", xlabel="tokens before the question",
            ylim=(-0.05, 1.05),
        )  # fmt: skip
        for axes, lengths in ((by_position, ends), (by_distance, config["distances"])):
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        continued = results["read"][0]["continued"]
        for row, (title, color) in enumerate(colors.items()):
            found = continued[title]
            size = found["bytes_in_the_end"] / 2**20
            by_token.barh(row, found["seconds_per_token"]["median"] * 1e3, color=color)
            by_token.annotate(
                f" {size:.0f} MiB", (found["seconds_per_token"]["median"] * 1e3, row), va="center"
            )
        by_token.set(
            title=f"A token behind {config['length']:,}, and the cache", xlabel="ms",
            yticks=range(len(colors)), yticklabels=list(colors),
        )  # fmt: skip
        by_token.margins(x=0.2)
        by_token.grid(axis="y", visible=False)
        _, *rows = _speech(results)
        kinds = sorted({row["title"].rpartition(", ")[0] for row in rows})
        for kind, color in zip(kinds, COLORS[2:], strict=False):
            of_kind = [row for row in rows if row["title"].startswith(kind)]
            by_time.plot(
                [row["time"] for row in of_kind], [row["word_error"] for row in of_kind],
                color=color, marker="o", markersize=4, label=kind,
            )  # fmt: skip
        by_time.axhline(WORD_ERROR, color=BASELINE_COLOR, linestyle="--")
        by_time.set(title="Speech: word error", xlabel="time of the encoder ÷ exact")
        by_position.legend()
        by_time.legend()
    return drawn
