"""BLOSUM62, and how near a similarity of the amino acids is to it."""

from __future__ import annotations

from itertools import combinations

import torch
from Bio.Align import substitution_matrices
from jaxtyping import Float
from torch import Tensor

from performers.data.vocabulary import STANDARD_AMINO_ACIDS


def blosum62() -> Float[Tensor, "amino_acids amino_acids"]:
    """B_ab / √(B_aa B_bb): BLOSUM62 with ones on its diagonal, as a correlation has them.

    Source: Henikoff and Henikoff 1992, as Biopython has it. The paper does not say how it
    normalizes.
    """
    scores = substitution_matrices.load("BLOSUM62")
    letters = STANDARD_AMINO_ACIDS
    matrix = torch.tensor([[scores[a, b] for b in letters] for a in letters], dtype=torch.float64)
    of_itself = matrix.diagonal().sqrt()
    return matrix / of_itself[:, None] / of_itself


def correlation(
    found: Float[Tensor, "amino_acids amino_acids"],
    expected: Float[Tensor, "amino_acids amino_acids"],
) -> float:
    """Pearson's, over the pairs of two different amino acids."""
    return float(torch.corrcoef(torch.stack([_pairs(found), _pairs(expected)]))[0, 1])


def permutation_test(
    found: Float[Tensor, "amino_acids amino_acids"],
    expected: Float[Tensor, "amino_acids amino_acids"],
    permutations: int,
    seed: int,
) -> float:
    """How probable so high a correlation is if the amino acids of one matrix are exchanged.

    Pairs that share an amino acid are not independent, so rows and columns move together.
    Source: Mantel 1967.
    """
    generator = torch.Generator().manual_seed(seed)
    reached = correlation(found, expected)
    as_high = 0
    for _ in range(permutations):
        order = torch.randperm(len(found), generator=generator)
        as_high += correlation(found[order][:, order], expected) >= reached
    return (1 + as_high) / (1 + permutations)


def ranks(found: Float[Tensor, "amino_acids amino_acids"]) -> dict[str, int]:
    """The place of each pair of different amino acids, 1 for the most similar."""
    names = ["".join(pair) for pair in combinations(STANDARD_AMINO_ACIDS, 2)]
    order = _pairs(found).argsort(descending=True).tolist()
    return {names[index]: place for place, index in enumerate(order, start=1)}


def _pairs(matrix: Float[Tensor, "amino_acids amino_acids"]) -> Float[Tensor, " pairs"]:
    rows, columns = torch.triu_indices(*matrix.shape, offset=1)
    return matrix[rows, columns]
