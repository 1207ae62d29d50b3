"""Appendix A.1.1: books in pieces of a vocabulary that is invertible, and their multipliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.data.text import encode_text, train_vocabulary
from performers.records import markdown_table
from performers.reproduction import read_texts
from performers.viz.figures import COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """The books `valid` and `test` are held out; a vocabulary is trained on all others."""

    texts: str = "books"
    valid: tuple[str, ...] = ("Northanger Abbey",)
    test: tuple[str, ...] = ("Persuasion", "Moby-Dick")
    vocab_size: int = 32768
    seed: int = 0  # as every experiment has; nothing here is random


# PG-19 cannot be had without its host; what packages ship of its years stands in for it.
PAPER = Config()
REDUCED = replace(PAPER, texts="novels", test=("Persuasion",), vocab_size=8192)
SMOKE = replace(REDUCED, texts="excerpts", valid=(), test=("persuasion",), vocab_size=512)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

# Words and pieces of PG-19, and the log likelihood multipliers.
THE_PAPERS = {
    "train": (1_973_136_207, 3_084_760_726, 1.5634),
    "valid": (3_007_061, 4_656_945, 1.5487),
    "test": (6_966_499, 10_699_704, 1.5359),
}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    texts, origin = read_texts(config.texts, report)
    held_out = {"valid": config.valid, "test": config.test}
    split_of = {title: split for split, titles in held_out.items() for title in titles}
    if missing := sorted(split_of.keys() - texts.keys()):
        raise ValueError(f"valid and test must name books of {sorted(texts)}, got {missing}.")
    train = [text for title, text in texts.items() if title not in split_of]
    report(f"training a vocabulary of {config.vocab_size:,} on {len(train)} texts")
    tokenizer = train_vocabulary(train, config.vocab_size, is_invertible=True)
    report("encoding and decoding")
    rows = []
    for title, text in texts.items():
        (pieces,) = encode_text([text], tokenizer)
        decoded = tokenizer.decode(pieces.tolist(), skip_special_tokens=False)
        rows.append(
            {
                "title": title,
                "split": split_of.get(title, "train"),
                "characters": len(text),
                "words": len(text.split()),
                "pieces": len(pieces),
                "is_returned": decoded == text,
            }
        )
    return {"books": rows, "vocab_size": tokenizer.get_vocab_size(), "texts": origin}


def _counts(results: Mapping[str, Any], split: str) -> tuple[int, int]:
    """Words and pieces of a split."""
    rows = [row for row in results["books"] if row["split"] == split]
    return sum(row["words"] for row in rows), sum(row["pieces"] for row in rows)


def figure(config: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = drawn.subplots()
        for color, split in zip(COLORS, THE_PAPERS, strict=False):
            rows = [row for row in results["books"] if row["split"] == split]
            multipliers = [row["pieces"] / row["words"] for row in rows]
            axes.plot([row["words"] for row in rows], multipliers, "o", color=color, label=split)
            axes.axhline(THE_PAPERS[split][2], color=color, linestyle="--", linewidth=1)
            if split != "train":
                for row, multiplier in zip(rows, multipliers, strict=True):
                    axes.annotate(
                        row["title"], (row["words"], multiplier), fontsize=8,
                        xytext=(6, 4), textcoords="offset points",
                    )  # fmt: skip
        axes.set(
            title="Pieces to a word, by book; dashed: PG-19 in the paper", xlabel="words",
            xscale="log",
        )  # fmt: skip
        axes.margins(x=0.15)
        axes.legend()
    return drawn


def summary(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    rows = [["set", "", "words", "pieces", "log likelihood multiplier"]]
    for split, (words, pieces, multiplier) in THE_PAPERS.items():
        ours = _counts(results, split)
        if not ours[0]:
            continue
        rows.append([split, "here", *(f"{n:,}" for n in ours), f"{ours[1] / ours[0]:.4f}"])
        rows.append(["", "PG-19", f"{words:,}", f"{pieces:,}", f"{multiplier:.4f}"])
    books = results["books"]
    returned = sum(row["is_returned"] for row in books)
    return "\n\n".join(
        [
            markdown_table(rows),
            f"A vocabulary of {results['vocab_size']:,} pieces. Decoding gives {returned} of "
            f"{len(books)} texts back, character by character.",
        ]
    )
