"""The attention that a trained model implies: of one protein, and to each amino acid of many."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.data.proteins import crop_sequences, find_protein
from performers.data.vocabulary import AMINO_ACID_IDS, STANDARD_AMINO_ACIDS
from performers.train.tasks import Model

__all__ = [
    "amino_acid_similarity",
    "attention_to_amino_acids",
    "residue_attention",
    "save_attention_maps",
]

# Bovine pancreatic trypsin inhibitor, the protein of the paper's Figure 10; it is in the sample.
ACCESSION = "P00974"

MOST_LAYERS = 4
MOST_HEADS = 8


@torch.no_grad()
def residue_attention(
    model: Model, ids: Int[Tensor, " length"]
) -> Float[Tensor, "layers heads residues residues"]:
    """The matrices of a model on one sequence, rows and columns of special tokens left out.

    What a residue gives to special tokens is missing from the sum of its row.
    Source: Choromanski et al. 2021, Appendix C.4.
    """
    model.eval()
    outputs = model(input_ids=ids[None].to(model.device), output_attentions=True)
    residues = (ids >= AMINO_ACID_IDS.start).nonzero().squeeze(1).to(model.device)
    matrices = torch.stack([matrix[0].float() for matrix in outputs.attentions])
    return matrices[:, :, residues][..., residues]


def save_attention_maps(model: Model, path: Path) -> str:
    """Write the matrices of the model on one protein to an npz file; returns the protein's name.

    "attention": (layers, heads, residues, residues), float16, without the special tokens; rows
    attend to columns. "layers": which layers, evenly spaced, at most four; of the heads the first
    eight.

    Source: Choromanski et al. 2021, Appendix C.4.
    """
    protein = find_protein(ACCESSION)
    tokens = crop_sequences([protein.sequence], len(protein.sequence) + 2)[0]["input_ids"]
    matrices = residue_attention(model, tokens)
    count = len(matrices)
    layers = np.linspace(0, count - 1, min(count, MOST_LAYERS)).round().astype(int)
    attention = matrices[layers, :MOST_HEADS].cpu().numpy().astype(np.float16)
    np.savez_compressed(path, attention=attention, layers=layers)
    return f"{protein.identifier.split('|')[-1]} ({ACCESSION})"


def attention_to_amino_acids(
    model: Model, sequences: Iterable[Int[Tensor, " _"]]
) -> Float[Tensor, "layers heads amino_acids"]:
    """The share of its attention that each head gives to each of the 20 standard amino acids.

        p_h(a) = Σ_x Σ_i Σ_{j: x_j = a} A_h(x)_ij / Σ_x Σ_i Σ_j A_h(x)_ij

    over residues i and j of the sequences x, which have tokens of `performers.data.vocabulary`.
    Source: Vig et al. 2020, "BERTology Meets Biology", Section 3.
    """
    kinds = len(AMINO_ACID_IDS)
    total: Tensor | None = None
    for ids in sequences:
        received = residue_attention(model, ids).sum(2)
        residues = ids[ids >= AMINO_ACID_IDS.start].to(received.device) - AMINO_ACID_IDS.start
        given = received @ F.one_hot(residues, kinds).to(received)
        total = given if total is None else total + given
    if total is None:
        raise ValueError("attention must be measured on at least one sequence, got none.")
    return total[..., : len(STANDARD_AMINO_ACIDS)] / total.sum(-1, keepdim=True)


def amino_acid_similarity(
    shares: Float[Tensor, "layers heads amino_acids"],
) -> Float[Tensor, "amino_acids amino_acids"]:
    """Two amino acids are similar if the heads that look at one look at the other.

        similarity(a, b) = the Pearson correlation of p_h(a) and p_h(b) over all heads h

    Source: Vig et al. 2020, "BERTology Meets Biology", Section 4; Choromanski et al. 2021, Fig. 13.
    """
    return torch.corrcoef(shares.double().flatten(0, 1).T)
