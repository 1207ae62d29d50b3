"""The features of queries and of keys, before their exponential."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.blocks.sizes import LOG2_E, Problem
from performers.backends.buffers import buffers

__all__ = ["Mapped", "Side", "both_sides", "of_heads"]


class Mapped(NamedTuple):
    """Rows of one head, and what their features are computed from."""

    products: Float[Tensor, "rows columns"]  # with `Side.columns`
    logits: Float[Tensor, "rows num_features"]  # log₂ φ less all numbers: the last of the products
    y: Float[Tensor, "rows dim"]  # times a number, the other products or the rows themselves


class Side(NamedTuple):
    """What the features of queries, or of keys, are computed from, x being their rows in `Heads`.

    log₂ φ_m(x) = log₂e (y·ω_m + number), but for the numbers of the features
    y = √s (x − shift) matrix,     number = √s (x − shift)·linear − ‖y‖²/2
    with s the scale of logits. One product has both y and y·ω_m.
    """

    # of each head, or one for all: [√(log₂e/2) √s matrix, log₂e √s matrix ωᵀ], without a matrix
    # the latter alone
    columns: tuple[Float[Tensor, "dim columns"], ...]
    shift: tuple[Float[Tensor, "1 dim"], ...] | None
    linear: tuple[Float[Tensor, "1 dim"], ...] | None  # times log₂e √s
    num_features: int
    unit: float  # √s

    @classmethod
    def of(
        cls,
        scale: float,
        directions: Tensor,
        shift: Tensor | None,
        matrix: Tensor | None,
        linear: Tensor | None,
    ) -> Side:
        """For all heads."""
        unit = math.sqrt(scale)
        columns = directions.mT * (unit * LOG2_E)
        if matrix is not None:
            number = max(len(matrix), len(columns))
            matrix = matrix.expand(number, -1, -1)
            columns = torch.bmm(matrix, columns.expand(number, -1, -1))
            columns = torch.cat([matrix * (unit * ROOT), columns], dim=-1)
        return cls(
            columns.unbind(),
            None if shift is None else (shift / unit).unbind(),
            None if linear is None else (linear * (unit * LOG2_E)).unbind(),
            directions.shape[1],
            unit,
        )

    @property
    def width(self) -> int:
        """Of y among the products, 0 without a matrix."""
        return self.columns[0].shape[-1] - self.num_features

    def products(self, name: str, *rows: int, like: Tensor) -> Float[Tensor, "*rows columns"]:
        """Room for them."""
        return buffers.take(name, (*rows, self.columns[0].shape[-1]), like)

    def mapped(
        self, head: int, x: Float[Tensor, "rows dim"], products: Float[Tensor, "rows columns"]
    ) -> tuple[Mapped, Float[Tensor, " rows"]]:
        """Rows of a head, into `products`, and the numbers of these rows in base 2. The next rows
        take their other room again."""
        x = self.centered(head, x)
        torch.mm(x, of_head(self.columns, head), out=products)
        mapped = self.found(x, products)
        number = buffers.take("number", x.shape[:1], x)
        torch.linalg.vector_norm(mapped.y, dim=-1, out=number).square_()
        factor = -1.0 if self.width else -((self.unit * ROOT) ** 2)
        if self.linear is not None:
            number.addmv_(x, of_head(self.linear, head)[0], beta=factor)
        else:
            number.mul_(factor)
        return mapped, number

    def found(
        self, centered: Float[Tensor, "rows dim"], products: Float[Tensor, "rows columns"]
    ) -> Mapped:
        """From products that were made before."""
        width = self.width
        y = products[:, :width] if width else centered
        return Mapped(products, products[:, width:], y)

    def centered(self, head: int, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        if self.shift is None:
            return x
        return torch.sub(x, of_head(self.shift, head), out=buffers.take("centered", x.shape, x))

    def directions_back(self, mapped: Mapped, of_directions: Tensor) -> None:
        """Add the gradient of ω, of that of log φ in the place of logits."""
        unit = 1 / ROOT if self.width else self.unit
        of_directions.addmm_(mapped.logits.mT, mapped.y, alpha=unit)

    def mapped_back(self, head: int, mapped: Mapped, of_x: Tensor) -> None:
        """Add the gradient of x, of that of log φ in the place of logits; what was mapped is
        lost."""
        of_number = mapped.logits.sum(dim=-1, keepdim=True)
        if self.width:
            mapped.y.mul_(of_number * -2)
        else:
            of_x.addcmul_(mapped.y, of_number, value=-(self.unit**2))
        of_x.addmm_(mapped.products, of_head(self.columns, head).mT, alpha=1 / LOG2_E)
        if self.linear is not None:
            of_x.addcmul_(of_number, of_head(self.linear, head), value=1 / LOG2_E)


ROOT = math.sqrt(LOG2_E / 2)


def of_head(parts: tuple[Tensor, ...], head: int) -> Tensor:
    """What belongs to one head, or to all alike."""
    return parts[head if len(parts) > 1 else 0]


def both_sides(problem: Problem) -> tuple[Side, Side]:
    """Of queries and of keys."""
    return (
        Side.of(
            problem.scale, problem.query_directions, problem.query_shift, problem.query_matrix,
            problem.query_linear,
        ),
        Side.of(
            problem.scale, problem.key_directions, problem.key_shift, problem.key_matrix,
            problem.key_linear,
        ),
    )  # fmt: skip


def of_heads(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x
