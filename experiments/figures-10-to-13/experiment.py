"""Figures 10 to 13: what a trained Performer attends to in proteins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from performers.data.proteins import crop_sequences, find_protein
from performers.records import markdown_table
from performers.reproduction import resumable_folder
from performers.reproduction.proteins import Proteins, timed_run
from performers.train.attention import (
    ACCESSION,
    amino_acid_similarity,
    attention_to_amino_acids,
    residue_attention,
)
from performers.train.config import RunConfig
from performers.train.tasks import build_model

from .drawing import drawn
from .heads import described, packed
from .similarity import blosum62, correlation, permutation_test, ranks


@dataclass(frozen=True)
class Config:
    """A bidirectional Performer with the sizes of the paper's, trained for `seconds`.

    `num_sequences`: proteins of the validation set from which the similarity of amino acids is
    estimated. `permutations`: of the amino acids, against which its correlation is tested.
    """

    source: str = "swissprot.fasta.gz"
    length: int = 1024
    fraction: float = 0.05
    attention: str = "performer-relu"
    hidden_size: int = 512
    num_hidden_layers: int = 36
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    num_projections: int = 256
    position: str = "rotary"
    initializer_range: float = 0.02
    batch_size: int = 128
    learning_rate: float = 1e-3
    redraw_every: int = 1000
    seconds: float = 7 * 24 * 3600.0
    evaluations: int = 4
    num_sequences: int = 800
    permutations: int = 10_000
    bf16: bool = True
    workers: int = 4
    seed: int = 0


PAPER = Config()
# The model of Figure 6 at this scale, with more heads and more time.
REDUCED = replace(
    PAPER, source="swissprot-families.fasta.gz", length=512, fraction=0.1, hidden_size=64,
    num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_projections=64,
    position="learned", initializer_range=0.1, batch_size=4, redraw_every=100, seconds=80.0,
    evaluations=2, num_sequences=120, bf16=False, workers=0,
)  # fmt: skip
SMOKE = replace(
    REDUCED, source="sample", length=64, position="rotary", hidden_size=16, num_hidden_layers=2,
    num_attention_heads=2, intermediate_size=16, num_projections=8, batch_size=4, redraw_every=2,
    seconds=0.02, evaluations=1, num_sequences=4, permutations=100, bf16=True,
)  # fmt: skip
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

# What the paper's similarity finds, and the share of all pairs that counts as finding it.
THE_PAPERS = ("DE", "FY")
FOUND = 0.05


def model(config: Config) -> dict[str, Any]:
    """Fields of `PerformerConfig`."""
    return {
        "attention": config.attention,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_projections": config.num_projections,
        "position": config.position,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.length,
        "hidden_dropout_prob": 0.0,
    }


def training_run(config: Config) -> RunConfig:
    return timed_run(
        "masked-lm", model(config), config.seconds,
        batch_size=config.batch_size, evaluations=config.evaluations,
        learning_rate=config.learning_rate, redraw_every=config.redraw_every, bf16=config.bf16,
        workers=config.workers, seed=config.seed,
    )  # fmt: skip


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    report(f"reading {config.source}")
    proteins = Proteins.read(
        config.source, config.length, config.num_sequences, {"valid": config.fraction},
        seed=config.seed,
    )  # fmt: skip
    planned = training_run(config)
    torch.manual_seed(config.seed)  # the weights that training begins with
    untrained = build_model(planned)
    with resumable_folder("figures-10-to-13", config) as folder:
        report(f"training for {config.seconds:g} s")
        trainer = proteins.train_model(planned, folder)
        training = proteins.outcome(trainer)
        # Matrices are read in float32.
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        report("attention in bovine trypsin inhibitor")
        sequence = find_protein(ACCESSION).sequence
        ids = crop_sequences([sequence], len(sequence) + 2)[0]["input_ids"]
        matrices = residue_attention(trained, ids).cpu()
        valid = proteins.scored["valid"]
        similarity = {}
        for name, one in {"trained": trained, "untrained": untrained.to(trained.device)}.items():
            report(f"attention to amino acids, {name}")
            rows = (valid[index]["input_ids"] for index in range(len(valid)))
            shares = attention_to_amino_acids(one, rows).cpu()
            similarity[name] = _compared(amino_acid_similarity(shares), config)
    return {
        "proteins": proteins.counts(),
        "baseline": proteins.baseline("masked-lm")["valid"],
        "training": training,
        "sequence": sequence,
        "heads": described(matrices),
        "attention": packed(matrices[:4]),
        "blosum62": _rounded(blosum62()),
        "similarity": similarity,
    }


def _compared(similarity: Tensor, config: Config) -> dict[str, Any]:
    """A similarity, its correlation with BLOSUM62, how probable as much is by chance, and the
    places of pairs when all are sorted by it."""
    expected = blosum62()
    return {
        "matrix": _rounded(similarity),
        "correlation": correlation(similarity, expected),
        "p": permutation_test(similarity, expected, config.permutations, config.seed),
        "ranks": ranks(similarity),
    }


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(number, 4) for number in row] for row in matrix.tolist()]


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    return drawn(results)


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    valid, baseline = results["training"]["scores"]["valid"], results["baseline"]
    kinds = [head["kind"] for head in results["heads"]]
    heads = [["layer", *(f"head {n}" for n in range(1, config["num_attention_heads"] + 1))]]
    for layer in range(1, config["num_hidden_layers"] + 1):
        of_layer = [head for head in results["heads"] if head["layer"] == layer]
        cells = [f"{h['kind']} ({h['near']:.0%}, {h['top']:.0%})" for h in of_layer]
        heads.append([str(layer), *cells])
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("local", "vertical", "global"))
    similarity = results["similarity"]
    pairs = len(similarity["trained"]["ranks"])
    rows = [["similarity of amino acids", "trained", "untrained"]]
    rows.append(["correlation with BLOSUM62", *_both(similarity, "correlation", "+.2f")])
    p = [f"{one['p']:.2g}" for one in similarity.values()]
    rows.append([f"p, of {config['permutations']:,} permutations", *p])
    for pair in THE_PAPERS:
        places = [one["ranks"][pair] for one in similarity.values()]
        words = [f"{_place(place, pairs)} (place {place} of {pairs})" for place in places]
        rows.append([f"the paper's ({pair[0]}, {pair[1]})", *words])
    first = sorted(similarity["trained"]["ranks"], key=similarity["trained"]["ranks"].__getitem__)
    most = ", ".join(f"({pair[0]}, {pair[1]})" for pair in first[:10])
    return "\n\n".join(
        [
            f"The model reaches {valid['accuracy']:.2%} of the hidden amino acids of "
            f"{results['proteins']['scored valid']:,} proteins of the validation set, the "
            f"empirical baseline {baseline['accuracy']:.2%}.",
            f"Heads in BPT1_BOVIN: {counts}. In brackets: the share of their attention to "
            "residues at most 3 away, and to the 3 residues that are attended to most.",
            markdown_table(heads),
            markdown_table(rows),
            f"The ten most similar pairs: {most}.",
        ]
    )


def _both(similarity: Mapping[str, Any], key: str, form: str) -> list[str]:
    return [f"{one[key]:{form}}" for one in similarity.values()]


def _place(place: int, pairs: int) -> str:
    return "found" if place <= FOUND * pairs else "missing"
