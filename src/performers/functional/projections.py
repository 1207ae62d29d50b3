"""ω: the random directions of the paper's Section 2.4, drawn without bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from performers.checks import check_choice, check_count, check_instance

__all__ = [
    "DISTRIBUTIONS",
    "PROJECTIONS",
    "check_generator",
    "draw_projection",
    "walsh_hadamard_transform",
]

DISTRIBUTIONS = ("gaussian", "sphere")


def draw_projection(
    num_projections: int,
    dim: int,
    kind: str = "orthogonal",
    distribution: str = "gaussian",
    generator: Generator | None = None,
) -> Float[Tensor, "num_projections dim"]:
    """Draw ω: every row by itself is N(0, I) or uniform on a sphere; rows may be orthogonal.

    `kind`: "iid" rows are independent. The others take the rows of random orthogonal matrices, one
    independent matrix per block of `dim` rows, which lowers the variance of every estimator
    (Theorem 2). "orthogonal" (R-ORF) draws them from the Haar measure and leaves every estimate
    unbiased. "hadamard" (H-ORF) and "givens" (G-ORF) multiply simple random rotations; first and
    second moments are exact, higher ones have a small bias that vanishes as `dim` grows.
    `distribution`: "gaussian" gives rows the length of a Gaussian vector (chi with `dim` degrees of
    freedom); "sphere" gives every row the length √dim, which estimates the regularized softmax
    kernel SMREG.

    Drawn on the CPU in float64 and returned in float32, so that a seed means the same on every
    device.
    `generator` must live on the CPU; without one the global generator is used.

    Raises ValueError for counts below 1 or unknown words.
    Cost: O(num_projections · dim²) for "orthogonal", O(num_projections · dim · log dim) for
    "hadamard" and "givens".
    Source: Choromanski et al. 2021, Section 2.4 and Appendix B.2.
    """
    check_count("num_projections", num_projections)
    check_count("dim", dim)
    check_choice("kind of projection", kind, PROJECTIONS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_generator(generator)
    directions = PROJECTIONS[kind](num_projections, dim, generator)
    # Hadamard directions may be wider than dim: they are drawn with the next power of two, then
    # cut.
    lengths = _draw_lengths(num_projections, directions.shape[1], distribution, generator)
    return (directions * lengths)[:, :dim].to(torch.float32)


def check_generator(generator: object) -> None:
    """Raise unless this is None, or a generator that draws on the CPU."""
    check_instance("generator", generator, (Generator, type(None)), "a torch.Generator or None")
    if isinstance(generator, Generator) and generator.device.type != "cpu":
        raise ValueError(
            f"generator must draw on the CPU, so that a seed means the same on every device: got "
            f"one on {generator.device}. Make it with torch.Generator()."
        )


def _draw_lengths(
    count: int, dim: int, distribution: str, generator: Generator | None
) -> Float[Tensor, "count 1"]:
    if distribution == "sphere":
        return torch.full((count, 1), math.sqrt(dim), dtype=torch.float64, device="cpu")
    return _normal(count, dim, generator).norm(dim=1, keepdim=True)


def _normal(rows: int, columns: int, generator: Generator | None) -> Tensor:
    # an explicit device: models are built under torch.device("meta") while weights load
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def _uniform(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def _signs(shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    bits = torch.randint(2, shape, generator=generator, dtype=torch.float64, device="cpu")
    return 2 * bits - 1


def _independent_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    return torch.nn.functional.normalize(_normal(count, dim, generator), dim=1)


def _haar_matrix(dim: int, generator: Generator | None) -> Tensor:
    """A Haar-distributed orthogonal matrix (Mezzadri 2007).

    The Q of a QR factorization is not Haar-distributed: LAPACK fixes signs, so the first coordinate
    of its first row would always be negative. Multiplying the columns of Q by the signs of R's
    diagonal makes the factorization unique. A unique Q inherits the invariance of the Gaussian
    matrix under rotations, which is the definition of Haar.
    """
    q, r = torch.linalg.qr(_normal(dim, dim, generator))
    return q * r.diagonal().sign()


def _orthogonal_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    blocks = [_haar_matrix(dim, generator) for _ in range(math.ceil(count / dim))]
    # Rows of the last block may be left over. Any subset of Haar rows has the same distribution.
    return torch.cat(blocks)[:count]


def _givens_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    """Rows of products of random Givens rotations and signs: orthogonal in every draw, nearly Haar.

    A round pairs the coordinates at random and turns every pair by a uniform angle. For any row u,
    each round shrinks the distance of Σᵢ E uᵢ⁴ from its value under Haar, 3/(dim+2), by a factor
    below 3/4. After 6·log₂ dim rounds the relative distance is about dim^(-1.5)/3: 0.07 % at dim
    64. At dim 2 a single round is Haar already. The random signs make both determinants, 1 and −1,
    equally likely.

    Cost: O(count · dim · log dim), but in more steps than QR, which is faster at the dims of heads.
    Source: Choromanski et al. 2021, Appendix B.2; the mixing is that of Kac's random walk.
    """
    blocks, pairs = math.ceil(count / dim), dim // 2
    rows = torch.diag_embed(_signs((blocks, dim), generator))
    for _ in range(math.ceil(6 * math.log2(dim))):
        # The shuffle need not be undone: a permutation is orthogonal too.
        rows = rows.take_along_dim(_uniform((blocks, dim, 1), generator).argsort(dim=1), dim=1)
        angles = 2 * math.pi * _uniform((blocks, pairs, 1), generator)
        cosine, sine = angles.cos(), angles.sin()
        # After the shuffle, row i of the first half is paired with row i of the second half. An odd
        # dim leaves one row without a partner.
        left, right, unpaired = rows.split([pairs, pairs, dim - 2 * pairs], dim=1)
        rows = torch.cat(
            [cosine * left - sine * right, sine * left + cosine * right, unpaired], dim=1
        )
    return rows.flatten(0, 1)[:count]


def walsh_hadamard_transform(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """H x for the Hadamard matrix H, whose entries are ±1/√dim: symmetric and orthogonal.

    `dim` must be a power of two, else ValueError. Cost: O(dim · log dim) per vector.

    >>> walsh_hadamard_transform(torch.tensor([2.0, 0.0, 0.0, 0.0]))
    tensor([1., 1., 1., 1.])
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(
            f"the last axis must be a power of two long, got {tuple(x.shape)}. Pad it with zeros."
        )
    half = 1
    while half < dim:
        left, right = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([left + right, left - right], dim=-2).flatten(-3)
        half *= 2
    return x / math.sqrt(dim)


def _hadamard_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    """Rows of H D₁ H D₂ H D₃, of length 1 and as wide as the next power of two.

        H: Hadamard matrix, D: diagonals of random signs, one triple per block of rows

    H needs a power of two. For other dims the rows are orthogonal before they are cut to dim.

    First and second moments are exactly those of Haar rows. A fourth moment is smaller than Haar's
    by at most the fraction 8/(3·dim²) (4 % at dim 8, 0.07 % at dim 64), which is reached in the
    direction of a coordinate axis. Below dim 8 there are too few sign patterns for directions that
    are nearly uniform.

    Source: Choromanski et al. 2021, Appendix B.2; Choromanski et al. 2017, "The Unreasonable
    Effectiveness of Structured Random Orthogonal Embeddings".
    """
    width = 2 ** (dim - 1).bit_length()
    blocks = math.ceil(count / width)
    signs = _signs((blocks, 3, width), generator)
    columns = torch.eye(width, dtype=torch.float64, device="cpu").expand(blocks, -1, -1)
    for diagonals in signs.flip(1).unbind(1):  # from the right: D₃ multiplies first
        columns = walsh_hadamard_transform(columns * diagonals[:, None])
    return columns.mT.flatten(0, 1)[:count]


PROJECTIONS: dict[str, Callable[[int, int, Generator | None], Tensor]] = {
    "iid": _independent_directions,
    "orthogonal": _orthogonal_directions,
    "hadamard": _hadamard_directions,
    "givens": _givens_directions,
}
