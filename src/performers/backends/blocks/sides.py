"""The features of queries and of keys, before their exponential."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.blocks import sizes
from performers.backends.buffers import buffers, slices

__all__ = ["Side", "of_heads"]


class Side(NamedTuple):
    """What the features of queries, or of keys, are computed from, x being their rows in `Heads`.

    log φ_m(x) = y·ω_m + number, but for the numbers of the features
    y = (x − shift) matrix,     number = (x − shift)·linear − ‖y‖²/2
    """

    directions: Float[Tensor, "#heads num_features dim"]
    shift: Float[Tensor, "#heads 1 dim"] | None
    matrix: Float[Tensor, "#heads dim dim"] | float
    linear: Float[Tensor, "#heads 1 dim"] | None

    @classmethod
    def of(
        cls,
        unit: float,
        directions: Tensor,
        shift: Tensor | None,
        matrix: Tensor | None,
        linear: Tensor | None,
    ) -> Side:
        """For rows that are x / unit."""
        return cls(
            directions,
            None if shift is None else shift / unit,
            unit if matrix is None else matrix * unit,
            None if linear is None else linear * unit,
        )

    def mapped(self, heads: slice, x: Tensor, y: Tensor, number: Tensor) -> None:
        """Write y and number, [heads, rows, dim] and [heads, rows], so many rows at a time that
        they stay in the cache."""
        size = sizes.TILE_BYTES // (4 * len(x) * x.shape[2] * x.element_size())
        for rows in slices(x.shape[1], max(64, size)):
            part, of_part, of_number = x[:, rows], y[:, rows], number[:, rows]
            spare = buffers.take("spare", part.shape, x)
            if self.shift is not None:
                centered = buffers.take("centered", part.shape, x)
                part = torch.sub(part, of_heads(self.shift, heads), out=centered)
            if isinstance(self.matrix, float):
                torch.mul(part, self.matrix, out=of_part)
            else:
                torch.bmm(part, of_heads(self.matrix, heads).expand(len(x), -1, -1), out=of_part)
            torch.sum(torch.mul(of_part, of_part, out=spare), dim=-1, out=of_number).mul_(-0.5)
            if self.linear is not None:
                of_number.add_((part @ of_heads(self.linear, heads).mT).squeeze(-1))

    def mapped_back(self, heads: slice, y: Tensor, of_y: Tensor, of_number: Tensor) -> Tensor:
        """The gradient of x; that of y is lost."""
        of_number = of_number.unsqueeze(-1)
        of_x = of_y.addcmul_(y, of_number, value=-1)
        if isinstance(self.matrix, float):
            of_x.mul_(self.matrix)
        else:
            matrix = of_heads(self.matrix, heads).expand(len(y), -1, -1)
            of_x = torch.bmm(of_x, matrix.mT, out=buffers.take("spare", of_y.shape, of_y))
        if self.linear is not None:
            of_x.addcmul_(of_number, of_heads(self.linear, heads))
        return of_x


def of_heads(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x
