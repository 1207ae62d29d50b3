"""Features f(ω·x) + ε of rows, what flows back through them, and what else all tiles share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.buffers import buffers
from performers.backends.reference import renormalized
from performers.kernels import KERNELS

__all__ = ["Map", "columns", "inverse", "of_heads", "tiles_of"]


class Map:
    """F of some heads, a tile at a time, and what flows back through it."""

    def __init__(
        self,
        kernel: str,
        epsilon: float,
        root: float,
        directions: Float[Tensor, "num_features dim"] | None,
        like: Tensor,
    ) -> None:
        self.kernel = KERNELS[kernel]
        self.epsilon = like.new_tensor(epsilon)  # a number would be made one at each sum
        self.root = root
        self.directions = directions
        self.factor = 1.0 if directions is None else 1 / math.sqrt(len(directions))
        self.like = like
        self.of_directions: Tensor | None = None  # where their gradient is added up

    def wide(self, name: str, x: Tensor) -> Tensor:
        """x in the precision of the sums."""
        return x if x.dtype == self.like.dtype else buffers.copied(name, x, self.like)

    def projected(self, name: str, x: Tensor) -> Float[Tensor, "heads rows num_features"]:
        """u = root · x·directions."""
        x = self.wide(f"{name} inputs", x)
        if self.directions is None:
            return buffers.copied(name, x, self.like).mul_(self.root)
        return buffers.product(name, x, self.directions.expand(x.shape[0], -1, -1).mT, self.root)

    def features(
        self,
        projected: Float[Tensor, "heads rows num_features"],
        presence: Tensor | None = None,
        beside: str | None = None,
    ) -> Float[Tensor, "heads rows num_features"]:
        """F = f(u) + ε, and 0 for masked keys; over u, or in memory of that name beside it."""
        if self.kernel.into is None:
            features = self.kernel.fn(projected)
        elif beside is None:
            features = self.kernel.into(projected, projected)
        else:
            room = buffers.take(f"{beside} features", projected.shape, projected)
            features = self.kernel.into(projected, room)
        features.add_(self.epsilon)
        return features if presence is None else features.mul_(presence)

    def scores(self, queries: Tensor, keys: Tensor) -> Float[Tensor, "heads rows rows"]:
        """P, of features."""
        return buffers.product("scores", queries, keys.mT, self.factor).tril_()

    def backward(self, gradient: Tensor, projected: Tensor, x: Tensor, of_x: Tensor) -> None:
        """Given the gradient of F, write that of x, and add that of the directions if asked for."""
        assert self.kernel.backward is not None, "Elementwise names a kernel with a derivative"
        gradient = self.kernel.backward(gradient, projected)
        if self.directions is None:
            torch.mul(gradient, self.root, out=of_x)
            return
        if self.of_directions is not None:
            gradients = buffers.product("of directions", gradient.mT, self.wide("wide", x))
            self.of_directions.add_(gradients.sum(dim=0), alpha=self.root)
        if len(of_x) == 1 and of_x.dtype == gradient.dtype:  # one product, wherever rows lie
            torch.addmm(of_x[0], gradient[0], self.directions, beta=0, alpha=self.root, out=of_x[0])
            return
        directions = self.directions.expand(gradient.shape[0], -1, -1)
        of_x.copy_(buffers.product("of inputs", gradient, directions, self.root))


def of_heads(
    x: Float[Tensor, all_heads * _] | None, heads: slice
) -> Float[Tensor, heads * _] | None:
    """What belongs to some heads; None stays None."""
    return None if x is None else x[heads]


def tiles_of(
    cut: Callable[[Tensor], Sequence[Tensor]], *parts: Tensor | None
) -> list[tuple[Any, ...]]:
    """What each tile has of the parts, which are cut alike; None stays None."""
    cuts = (itertools.repeat(None) if x is None else cut(x) for x in parts)
    return list(zip(*cuts, strict=False))


def columns(
    of_out: Float[Tensor, "*rows value_dim"],
    out: Float[Tensor, "*rows value_dim"],
    rate: Float[Tensor, "*rows 1"],
    normalize: bool,
) -> tuple[Float[Tensor, "*rows value_dim"], Float[Tensor, "*rows 1"]]:
    """The columns of G that belong to V, and the one that belongs to 1."""
    gradient = torch.mul(of_out, rate, out=buffers.take("gradient", of_out.shape, rate))
    if not normalize:
        return gradient, torch.zeros_like(rate)
    # From the derivative of 1/D: the normalizer moves all outputs by −out / D.
    along = torch.mul(gradient, out, out=buffers.take("along", out.shape, rate))
    return gradient, along.sum(dim=-1, keepdim=True).neg_()


def inverse(normalizer: Tensor, is_nonnegative: bool) -> Tensor:
    """D⁻¹ as `reference.Partial.output` has it."""
    if is_nonnegative:
        return (normalizer + (normalizer == 0)).reciprocal()
    return renormalized(normalizer).reciprocal()
