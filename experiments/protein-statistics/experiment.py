"""Table 1 and Figure 9: lengths of the proteins in each split, and how frequent amino acids are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from performers.data import EmpiricalBaseline, MaskedCollator
from performers.data.proteins import (
    Protein,
    concatenate_sequences,
    crop_sequences,
    read_proteins,
    split_proteins,
)
from performers.data.vocabulary import STANDARD_AMINO_ACIDS
from performers.records import markdown_table
from performers.viz.figures import COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """`length` of the windows of joined proteins, and of single ones, which are cropped."""

    source: str = "swissprot.fasta.gz"
    window: int = 8192
    length: int = 1024
    fraction: float = 0.1
    seed: int = 0


# TrEMBL, which the paper takes, has 139 million sequences. The whole of what packages ship stands
# in for it: performers data proteins swissprot.fasta.gz
PAPER = Config()
REDUCED = replace(PAPER, source="sample")
SMOKE = replace(REDUCED, window=4096)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

# Table 1: count, shortest, longest, mean, standard deviation and median of the lengths.
TABLE_1 = {
    "train": (104_863_744, 2, 74_488, 353.09, 311.16, 289.0),
    "valid": (102_400, 7, 11_274, 353.62, 307.42, 289.0),
    "test": (1_033_216, 8, 32_278, 353.96, 312.23, 289.0),
    "ood": (29_696, 24, 4_208, 330.96, 269.86, 200.0),
}
TABLE_1_WINDOWS = {"train": 4_532_224, "valid": 4_096}
TABLE_2 = {"accuracy": 0.0992, "perplexity": 17.80}  # the empirical baseline on the test set
CLASSES = {  # by the side chain, as the paper colors them
    "aliphatic": "AGILPV",
    "aromatic": "FWY",
    "sulfur": "CM",
    "hydroxyl": "ST",
    "basic": "RKH",
    "acidic or amide": "DENQ",
}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"reading {config.source}")
    proteins, duplicates = read_proteins(config.source)
    share = config.fraction
    splits = split_proteins(
        proteins, valid_fraction=share, test_fraction=share, ood_fraction=share, seed=config.seed
    )
    report("counting")
    sequences = {name: _sequences(split) for name, split in splits.items()}
    collator = MaskedCollator(seed=config.seed)
    train = crop_sequences(sequences["train"], config.length)
    baseline = EmpiricalBaseline.fit(train, collator.scored_token_ids)
    return {
        "duplicates": duplicates,
        "lengths": {name: _lengths(split) for name, split in sequences.items()},
        "windows": {
            name: len(concatenate_sequences(sequences[name], config.window))
            for name in TABLE_1_WINDOWS
        },
        "frequencies": baseline.frequencies(),
        "baseline": baseline.evaluate(crop_sequences(sequences["test"], config.length), collator),
    }


def _sequences(proteins: list[Protein]) -> list[str]:
    return [protein.sequence for protein in proteins]


def _lengths(sequences: list[str]) -> list[float]:
    """The columns of Table 1."""
    lengths = [len(sequence) for sequence in sequences]
    return [
        len(lengths), min(lengths), max(lengths), statistics.fmean(lengths),
        statistics.pstdev(lengths), statistics.median(lengths),
    ]  # fmt: skip


def figure(config: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
    frequencies = {letter: results["frequencies"][letter] for letter in STANDARD_AMINO_ACIDS}
    letters = sorted(frequencies, key=lambda letter: -frequencies[letter])
    with style.context(STYLE):
        drawn = Figure(figsize=(8.0, 3.6), layout="constrained")
        axes = drawn.subplots()
        for color, (name, members) in zip((*COLORS, "#6b7280"), CLASSES.items(), strict=True):
            places = [place for place, letter in enumerate(letters) if letter in members]
            heights = [100 * frequencies[letters[place]] for place in places]
            axes.bar(places, heights, color=color, label=name)
        axes.set_xticks(range(len(letters)), letters)
        axes.set(title="How frequent amino acids are in the training set", ylabel="%")
        axes.grid(visible=False, axis="x")
        axes.legend(fontsize=8)
    return drawn


def summary(config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    rows = [["set", "", "count", "shortest", "longest", "mean", "standard deviation", "median"]]
    for name, theirs in TABLE_1.items():
        rows.append([name, "here", *_cells(results["lengths"][name])])
        rows.append(["", "TrEMBL", *_cells(theirs)])
    windows = [[f"windows of {config['window']:,}", "here", "the paper's, of 8,192"]]
    windows += [
        [name, f"{results['windows'][name]:,}", f"{count:,}"]
        for name, count in TABLE_1_WINDOWS.items()
    ]
    ours = results["baseline"]
    baseline = [
        ["empirical baseline, test set", "here", "the paper, TrEMBL"],
        ["accuracy", f"{ours['accuracy']:.2%}", f"{TABLE_2['accuracy']:.2%}"],
        ["perplexity", f"{ours['perplexity']:.2f}", f"{TABLE_2['perplexity']:.2f}"],
    ]
    frequencies = results["frequencies"]
    first = sorted(STANDARD_AMINO_ACIDS, key=lambda letter: -frequencies[letter])
    order = ", ".join(f"{letter} {frequencies[letter]:.2%}" for letter in (*first[:3], *first[-3:]))
    tables = [markdown_table(table) for table in (rows, windows, baseline)]
    return "\n\n".join([*tables, f"The three most and the three least frequent: {order}."])


def _cells(numbers: Any) -> list[str]:
    count, shortest, longest, mean, deviation, median = numbers
    counts = [f"{int(number):,}" for number in (count, shortest, longest)]
    return [*counts, *(f"{number:.2f}" for number in (mean, deviation, median))]
