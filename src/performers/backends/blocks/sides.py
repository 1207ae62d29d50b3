"""The features of queries and of keys, before their exponential."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.blocks.sizes import LOG2_E
from performers.backends.buffers import buffers

__all__ = ["Mapped", "Side", "of_heads"]


class Mapped(NamedTuple):
    """Rows of one head, and what their features are computed from."""

    products: Float[Tensor, "rows columns"]  # with `Side.columns`
    logits: Float[Tensor, "rows num_features"]  # log₂ φ less all numbers: the last of the products
    y: Float[Tensor, "rows dim"]  # times a number, the other products or the rows themselves
    number: Float[Tensor, " rows"]  # of a row, in base 2


class Side(NamedTuple):
    """What the features of queries, or of keys, are computed from, x being their rows in `Heads`.

    log₂ φ_m(x) = log₂e (y·ω_m + number), but for the numbers of the features
    y = √s (x − shift) matrix,     number = √s (x − shift)·linear − ‖y‖²/2
    with s the scale of logits. One product has both y and y·ω_m.
    """

    # [√(log₂e/2) √s matrix, log₂e √s matrix ωᵀ], without a matrix the latter alone
    columns: Float[Tensor, "#heads dim columns"]
    shift: Float[Tensor, "#heads 1 dim"] | None
    linear: Float[Tensor, "#heads 1 dim"] | None  # times log₂e √s
    num_features: int
    unit: float  # √s

    @classmethod
    def of(
        cls,
        heads: slice,
        scale: float,
        directions: Tensor,
        *parts: Tensor | None,
    ) -> Side:
        """For some heads. `parts`: shift, matrix and linear."""
        unit = math.sqrt(scale)
        shift, matrix, linear = (None if x is None else of_heads(x, heads) for x in parts)
        columns = of_heads(directions, heads).mT * (unit * LOG2_E)
        if matrix is not None:
            number = max(len(matrix), len(columns))
            matrix = matrix.expand(number, -1, -1)
            columns = torch.bmm(matrix, columns.expand(number, -1, -1))
            columns = torch.cat([matrix * (unit * ROOT), columns], dim=-1)
        shift = None if shift is None else shift / unit
        linear = None if linear is None else linear * (unit * LOG2_E)
        return cls(columns, shift, linear, directions.shape[1], unit)

    @property
    def has_matrix(self) -> bool:
        return self.columns.shape[-1] > self.num_features

    def mapped(self, head: int, x: Float[Tensor, "rows dim"]) -> Mapped:
        """Rows of a head, in buffers that the next rows take again."""
        if self.shift is not None:
            centered = buffers.take("centered", x.shape, x)
            x = torch.sub(x, of_head(self.shift, head), out=centered)
        columns = of_head(self.columns, head)
        products = buffers.take("products", (len(x), columns.shape[-1]), x)
        torch.mm(x, columns, out=products)
        width = columns.shape[-1] - self.num_features
        y = products[:, :width] if width else x
        number = buffers.take("number", x.shape[:1], x)
        torch.linalg.vector_norm(y, dim=-1, out=number).square_()
        number.mul_(-1.0 if width else -((self.unit * ROOT) ** 2))
        if self.linear is not None:
            number.addmv_(x, of_head(self.linear, head)[0])
        return Mapped(products, products[:, width:], y, number)

    def directions_back(self, mapped: Mapped, of_logits: Tensor, of_directions: Tensor) -> None:
        """Add the gradient of ω, of that of log φ."""
        unit = 1 / ROOT if self.has_matrix else self.unit
        of_directions.addmm_(of_logits.mT, mapped.y, alpha=unit)

    def mapped_back(
        self, head: int, mapped: Mapped, of_logits: Float[Tensor, "rows num_features"], of_x: Tensor
    ) -> None:
        """Add the gradient of x, of that of log φ; what was mapped is lost."""
        of_number = of_logits.sum(dim=-1, keepdim=True)
        mapped.logits.copy_(of_logits)
        if self.has_matrix:
            mapped.y.mul_(of_number * -2)
        else:
            of_x.addcmul_(mapped.y, of_number, value=-(self.unit**2))
        of_x.addmm_(mapped.products, of_head(self.columns, head).mT, alpha=1 / LOG2_E)
        if self.linear is not None:
            of_x.addcmul_(of_number, of_head(self.linear, head), value=1 / LOG2_E)


ROOT = math.sqrt(LOG2_E / 2)


def of_head(x: Float[Tensor, "#heads *_"], head: int) -> Tensor:
    """What belongs to one head, or to all alike."""
    return x[head if len(x) > 1 else 0]


def of_heads(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x
