"""ω: the random directions of the paper's Section 2.4, drawn without bias."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from performers.checks import check_choice, check_count

__all__ = ["DISTRIBUTIONS", "PROJECTIONS", "draw_projection"]

DISTRIBUTIONS = ("gaussian", "sphere")


def draw_projection(
    num_projections: int,
    dim: int,
    kind: str = "orthogonal",
    distribution: str = "gaussian",
    generator: Generator | None = None,
) -> Float[Tensor, "num_projections dim"]:
    """Draw ω: every row by itself is N(0, I) or uniform on a sphere; rows may be orthogonal.

    `kind`: "iid" rows are independent; "orthogonal" (R-ORF) takes the rows of Haar-distributed
    orthogonal matrices, one independent matrix per block of `dim` rows, which lowers the variance
    of every estimator (Theorem 2) at no bias.
    `distribution`: "gaussian" gives rows the length of a Gaussian vector (chi with `dim` degrees of
    freedom); "sphere" gives every row length √dim, the regularized softmax kernel SMREG.

    Drawn on the CPU in float64 and returned in float32, so that a seed means the same on every
    device.
    `generator` must live on the CPU; without one the global generator is used.

    Raises ValueError for counts below 1 or unknown words.
    Cost: O(num_projections · dim²) for "orthogonal". Source: Choromanski et al. 2021, Section 2.4.
    """
    check_count("num_projections", num_projections)
    check_count("dim", dim)
    check_choice("kind of projection", kind, PROJECTIONS)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    directions = PROJECTIONS[kind](num_projections, dim, generator)
    if distribution == "sphere":
        lengths = torch.full((num_projections, 1), math.sqrt(dim), dtype=torch.float64)
    else:
        lengths = _normal(num_projections, dim, generator).norm(dim=1, keepdim=True)
    return (directions * lengths).to(torch.float32)


def _normal(rows: int, columns: int, generator: Generator | None) -> Tensor:
    # device="cpu" by name: models are built under torch.device("meta") while weights load
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64, device="cpu")


def _independent_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    return torch.nn.functional.normalize(_normal(count, dim, generator), dim=1)


def _haar_matrix(dim: int, generator: Generator | None) -> Tensor:
    """A Haar-distributed orthogonal matrix (Mezzadri 2007).

    QR alone is not Haar: LAPACK's Q has a sign convention, so the first coordinate of its first row
    would always be negative. Moving the signs of R's diagonal into Q makes the factorization
    unique, and the uniqueness makes Q inherit the invariance of the Gaussian.
    """
    q, r = torch.linalg.qr(_normal(dim, dim, generator))
    return q * r.diagonal().sign()


def _orthogonal_directions(count: int, dim: int, generator: Generator | None) -> Tensor:
    blocks = [_haar_matrix(dim, generator) for _ in range(math.ceil(count / dim))]
    return torch.cat(blocks)[:count]


PROJECTIONS: dict[str, Callable[[int, int, Generator | None], Tensor]] = {
    "iid": _independent_directions,
    "orthogonal": _orthogonal_directions,
}
