"""The features of queries and of keys, before their exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks.sizes import LOG2_E, Problem
from performers.backends.buffers import buffers

__all__ = ["Mapped", "Side", "both_sides", "of_heads"]

ROOT = math.sqrt(LOG2_E / 2)


@dataclass
class Mapped:
    """Rows of one head, in blocks, and what their features are computed from."""

    products: Float[Tensor, "rows columns"]  # with `Side.columns`
    # log₂ φ less all numbers, and later what takes its place: among the products, or apart
    logits: Float[Tensor, "blocks block num_features"]

    @cached_property
    def flat(self) -> Float[Tensor, "rows num_features"]:
        """The logits as rows."""
        return self.logits.flatten(0, 1)

    @cached_property
    def others(self) -> Float[Tensor, "rows _"]:
        """The products before those with ω."""
        return self.products[:, : -self.logits.shape[-1]]

    @cached_property
    def with_directions(self) -> Float[Tensor, "rows num_features"]:
        return self.products[:, -self.logits.shape[-1] :]

    @cached_property
    def in_blocks(self) -> Float[Tensor, "blocks block num_features"]:
        """The same as the logits are."""
        return self.with_directions.unflatten(0, self.logits.shape[:2])

    def part(self, blocks: slice) -> Mapped:
        size = self.logits.shape[1]
        rows = slice(blocks.start * size, blocks.stop * size)
        return Mapped(self.products[rows], self.logits[blocks])


@dataclass
class Side:
    """What the features of queries, or of keys, are computed from, x being their rows in `Heads`.

    log₂ φ_m(x) = log₂e (y·ω_m + number), but for the numbers of the features
    y = √s (x − shift) matrix,     number = √s (x − shift)·linear − ‖y‖²/2
    with s the scale of logits. One product has both y and y·ω_m.
    """

    # of each head, or one for all: [√(log₂e/2) √s matrix, log₂e √s matrix ωᵀ], without a matrix
    # the latter alone
    columns: Sequence[Float[Tensor, "dim columns"]]
    shift: Sequence[Float[Tensor, "1 dim"]] | None
    linear: Sequence[Float[Tensor, "1 dim"]] | None  # times log₂e √s
    num_features: int
    unit: float  # √s

    @property
    def width(self) -> int:
        """Of the columns before those of ω."""
        return self.columns[0].shape[-1] - self.num_features

    def room(self, name: str, blocks: int, block: int, like: Tensor) -> Mapped:
        """Where blocks of rows can be mapped to."""
        products = buffers.take(name, (blocks * block, self.columns[0].shape[-1]), like)
        return Mapped(products, products[:, self.width :].unflatten(0, (blocks, block)))

    def map(
        self, head: int, x: Float[Tensor, "rows dim"], mapped: Mapped
    ) -> Float[Tensor, " rows"]:
        """Rows of a head, and the numbers of these rows in base 2. The next rows take the room of
        numbers again."""
        x = self.centered(head, x)
        torch.mm(x, of_head(self.columns, head), out=mapped.products)
        number = _squared_norms("number", mapped.others if self.width else x)
        factor = -1.0 if self.width else -((self.unit * ROOT) ** 2)
        if self.linear is not None:
            return number.addmv_(x, of_head(self.linear, head)[0], beta=factor)
        return number.mul_(factor)

    def plus(
        self, head: int, mapped: Mapped, addend: Float[Tensor, "blocks _ _"]
    ) -> Float[Tensor, "blocks block num_features"]:
        """The logits, with numbers of rows or of features."""
        return mapped.logits.add_(addend)

    def centered(self, head: int, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        if self.shift is None:
            return x
        return torch.sub(x, of_head(self.shift, head), out=buffers.take("centered", x.shape, x))

    def directions_back(
        self, head: int, x: Float[Tensor, "rows dim"], mapped: Mapped, of_directions: Tensor
    ) -> None:
        """Add the gradient of ω, of that of log φ in the place of logits."""
        y, unit = (mapped.others, 1 / ROOT) if self.width else (self.centered(head, x), self.unit)
        of_directions.addmm_(mapped.flat.mT, y, alpha=unit)

    def back(self, head: int, x: Float[Tensor, "rows dim"], mapped: Mapped, of_x: Tensor) -> None:
        """Add the gradient of x, of that of log φ in the place of logits; what was mapped is
        lost."""
        of_number = mapped.flat.sum(dim=-1, keepdim=True)
        if self.width:
            mapped.others.mul_(of_number * -2)
        else:
            of_x.addcmul_(self.centered(head, x), of_number, value=-(self.unit**2))
        of_x.addmm_(mapped.products, of_head(self.columns, head).mT, alpha=1 / LOG2_E)
        if self.linear is not None:
            of_x.addcmul_(of_number, of_head(self.linear, head), value=1 / LOG2_E)


@dataclass
class OrthogonalSide(Side):
    """The same where ‖y‖² follows from the products with ω (`LogLinearSide.lengths`).

    Columns are [log₂e √s linear, √(log₂e/2) √s surplus, those of ω over `factors`]. The square of
    the norm of the first dim of the latter is that of the surplus and ‖y‖² log₂e/2.
    """

    factors: Sequence[Float[Tensor, "1 num_features"]]
    # those that a number depends on, with −surplus
    of_number: Sequence[Float[Tensor, "dim _"]]

    def room(self, name: str, blocks: int, block: int, like: Tensor) -> Mapped:
        # Logits apart: y is what they are computed from, and exponentials of what lies in one piece
        # take less time.
        logits = buffers.take(f"{name}: logits", (blocks, block, self.num_features), like)
        return Mapped(super().room(name, blocks, block, like).products, logits)

    def map(
        self, head: int, x: Float[Tensor, "rows dim"], mapped: Mapped
    ) -> Float[Tensor, " rows"]:
        torch.mm(self.centered(head, x), of_head(self.columns, head), out=mapped.products)
        linear, surplus = mapped.others[:, 0], mapped.others[:, 1:]
        number = _squared_norms("number", surplus).add_(linear)
        turned = mapped.with_directions[:, : x.shape[-1]]
        return number.sub_(_squared_norms("squared norms", turned))

    def plus(
        self, head: int, mapped: Mapped, addend: Float[Tensor, "blocks _ _"]
    ) -> Float[Tensor, "blocks block num_features"]:
        factors = of_head(self.factors, head)
        return torch.addcmul(addend, mapped.in_blocks, factors, out=mapped.logits)

    def back(self, head: int, x: Float[Tensor, "rows dim"], mapped: Mapped, of_x: Tensor) -> None:
        dim, of_logits = x.shape[-1], mapped.flat
        of_number = of_logits.sum(dim=-1, keepdim=True)
        known = mapped.products[:, : self.width + dim].mul_(of_number * -2)
        known[:, :1] = of_number
        factors = of_head(self.factors, head)[:, :dim]
        known[:, self.width :].addcmul_(of_logits[:, :dim], factors)
        of_x.addmm_(known, of_head(self.of_number, head).mT, alpha=1 / LOG2_E)
        if self.num_features > dim:
            columns = of_head(self.columns, head)[:, self.width + dim :]
            of_x.addmm_(of_logits[:, dim:], columns.mT, alpha=1 / LOG2_E)


def both_sides(problem: Problem, with_directions: bool = False) -> tuple[Side, Side]:
    """Of queries and of keys, for all heads. The gradient of directions needs columns for y."""
    return _side(problem, "query", with_directions), _side(problem, "key", with_directions)


def _side(problem: Problem, name: str, with_directions: bool) -> Side:
    directions, shift, matrix, linear, lengths, surplus = (
        getattr(problem, f"{name}_{part}")
        for part in ("directions", "shift", "matrix", "linear", "lengths", "surplus")
    )
    unit, num_features = math.sqrt(problem.scale), directions.shape[1]
    columns = directions.mT * (unit * LOG2_E)
    shift = None if shift is None else (shift / unit).unbind()
    linear = None if linear is None else linear * (unit * LOG2_E)
    of_rows = shift, None if linear is None else linear.unbind(), num_features, unit
    if matrix is None:
        return Side(columns.unbind(), *of_rows)
    columns = matrix @ columns
    if lengths is None or linear is None or with_directions:
        return Side(_joined(matrix * (unit * ROOT), columns), *of_rows)
    factors = F.pad(lengths * (2 * ROOT), (0, num_features - lengths.shape[-1]), value=1.0)
    columns, surplus, linear = columns / factors, surplus * (unit * ROOT), linear.mT
    return OrthogonalSide(
        _joined(linear, surplus, columns),
        *of_rows,
        factors.unbind(),
        _joined(linear, -surplus, columns[..., : lengths.shape[-1]]),
    )


def _joined(*columns: Float[Tensor, "#heads dim _"]) -> tuple[Float[Tensor, "dim columns"], ...]:
    """Columns side by side, by head."""
    heads = max(map(len, columns))
    return torch.cat([x.expand(heads, -1, -1) for x in columns], dim=-1).unbind()


def _squared_norms(name: str, y: Float[Tensor, "rows _"]) -> Float[Tensor, " rows"]:
    norm = buffers.take(name, y.shape[:1], y)
    return torch.linalg.vector_norm(y, dim=-1, out=norm).square_()


def of_head(parts: Sequence[Tensor], head: int) -> Tensor:
    """What belongs to one head, or to all alike."""
    return parts[head if len(parts) > 1 else 0]


def of_heads(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x
