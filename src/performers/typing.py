"""Names of dimensions, and the objects that are passed between the layers.

Dimension words, used in every public signature:

    batch, heads, length, dim     the layout of torch.nn.functional.scaled_dot_product_attention
    key_heads                     heads of keys and values; divides heads (grouped-query attention)
    query_length, key_length      differ in cross-attention
    value_dim                     columns of V
    num_projections               m, rows of ω
    num_features                  r, width of φ (2m for hyperbolic and trigonometric features)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeGuard, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "Attention",
    "Elementwise",
    "FeatureMap",
    "Features",
    "LogLinear",
    "LogLinearMap",
    "LogLinearSide",
    "elementwise",
    "is_log_linear",
]


class Features(NamedTuple):
    """φ(x) = values · exp(log_values + log_rows), in parts, so that nothing overflows.

    An absent part is None: no `values` means 1, no `log_values` or `log_rows` means 0. Positive
    features have no `values`, ReLU features nothing else, trigonometric ones `values` and
    `log_rows`.
    """

    values: Float[Tensor, "*batch length num_features"] | None = None
    log_values: Float[Tensor, "*batch length num_features"] | None = None
    log_rows: Float[Tensor, "*batch length 1"] | None = None

    def dense(self) -> Float[Tensor, "*batch length num_features"]:
        """φ(x) itself, as the paper writes it. It can overflow, so attention never calls it."""
        exponent = self.exponent()
        if self.values is None:
            return exponent.exp()
        return self.values * exponent.exp()

    def exponent(self) -> Float[Tensor, "*batch length width"]:
        """log_values + log_rows; `width` is num_features, or 1 where a row shares one exponent."""
        if self.log_values is not None and self.log_rows is not None:
            return self.log_values + self.log_rows
        if self.log_values is not None:
            return self.log_values
        if self.log_rows is not None:
            return self.log_rows
        assert self.values is not None, "Features must have at least one part"
        # Without exponents one column of zeros serves all features.
        return self.values.new_zeros(*self.values.shape[:-1], 1)


class LogLinear(NamedTuple):
    """log φ_m(x) = inputs·directions_m + tilt_m − ‖inputs‖²/2 + offset: positive features of the
    softmax kernel, before the product with the directions.

    `inputs` is x or an affine image of it, `tilt` is None for 0, `offset` a number, or one per row.
    Leading dimensions of `directions` and `tilt` are none, (heads,) or (batch, heads).
    """

    inputs: Float[Tensor, "*batch length dim"]
    directions: Float[Tensor, "*heads num_features dim"]
    offset: Float[Tensor, "*batch length 1"] | float
    tilt: Float[Tensor, "*heads num_features"] | None = None

    def shared_exponent(self) -> Float[Tensor, "*batch length 1"]:
        """The part of the exponent that all features of a row share."""
        return self.offset - self.inputs.square().sum(dim=-1, keepdim=True) / 2

    def features(self) -> Features:
        """The features themselves: `log_values`, which takes the product, and `log_rows`."""
        log_values = self.inputs @ self.directions.mT
        if self.tilt is not None:
            log_values = log_values + self.tilt.unsqueeze(-2)
        return Features(log_values=log_values, log_rows=self.shared_exponent())


class LogLinearSide(NamedTuple):
    """The map from queries, or from keys, to the features of a `LogLinearMap`.

        log φ_m(x) = y·directions_m + tilt_m − ‖y‖²/2 + (x − shift)·linear + constant
        y          = (x − shift) matrix

    None means 0 for shift, linear and tilt, and the identity for the matrix. Leading dimensions are
    none, (heads,) or (batch, heads).

    Where the first dim directions are orthogonal once a few coordinates of y are shortened, their
    products have the norm of y, so that y itself need not be computed (None: not known):

        ‖y‖² = Σ_{m < dim} (y·directions_m / lengths_m)² − ‖(x − shift) surplus‖²
    """

    directions: Float[Tensor, "*heads num_features dim"]
    constant: Float[Tensor, "*heads 1 1"] | float
    tilt: Float[Tensor, "*heads num_features"] | None = None
    shift: Float[Tensor, "*heads 1 dim"] | None = None
    matrix: Float[Tensor, "*heads dim dim"] | None = None
    linear: Float[Tensor, "*heads 1 dim"] | None = None
    lengths: Float[Tensor, "*heads 1 dim"] | None = None
    surplus: Float[Tensor, "*heads dim few"] | None = None

    def log_linear(self, x: Float[Tensor, "*batch length dim"]) -> LogLinear:
        """log φ(x), before the product with the directions."""
        centered = x if self.shift is None else x - self.shift
        offset = self.constant
        if self.linear is not None:
            offset = centered @ self.linear.mT + offset
        inputs = centered if self.matrix is None else centered @ self.matrix
        return LogLinear(inputs, self.directions, offset, self.tilt)


class Elementwise(NamedTuple):
    """φ(x) = (f(directions·x) + epsilon) / √columns: features without exponents, before they are
    computed.

    `kernel` names f, a row of `performers.kernels.KERNELS` that has a derivative. Without
    `directions` φ(x) = f(x) + epsilon.
    """

    kernel: str
    epsilon: float
    directions: Float[Tensor, "num_features dim"] | None


@runtime_checkable
class FeatureMap(Protocol):
    """φ, as attention needs to know it. The modules that implement it are in `performers.nn`."""

    @property
    def num_features(self) -> int: ...

    @property
    def default_scale(self) -> float:
        """The `scale` of attention when the caller gives none: dim**-0.5 for softmax, else 1."""

    @property
    def is_nonnegative(self) -> bool:
        """Whether φ(q)·φ(k) ≥ 0 always, so that the normalizer cannot vanish or change sign."""

    @property
    def is_softmax(self) -> bool:
        """Whether E[φ(q)·φ(k)] = exp(q·k), so that exact scores may stand beside estimated ones."""

    def fitted(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        key_padding_mask: Bool[Tensor, "batch key_length"] | None,
        *,
        scale: float,
        is_streaming: bool,
    ) -> FeatureMap:
        """The map for this call: itself, unless it learns from the call's queries and keys."""

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features: ...

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features: ...


@runtime_checkable
class LogLinearMap(FeatureMap, Protocol):
    """A feature map whose features are exponentials of linear functions, and so are positive.

    The sides of queries and keys have equal directions and tilts.
    """

    @property
    def is_log_linear(self) -> bool:
        """True. Where a map is set to other features it is False, and nobody asks for sides."""

    def query_side(self, dtype: torch.dtype) -> LogLinearSide: ...

    def key_side(self, dtype: torch.dtype) -> LogLinearSide: ...


def is_log_linear(phi: FeatureMap) -> TypeGuard[LogLinearMap]:
    """Whether φ is a `LogLinearMap`, in a form that torch.compile can trace."""
    return getattr(phi, "is_log_linear", False)


def elementwise(phi: FeatureMap) -> Elementwise | None:
    """The `elementwise` of a feature map; None for maps without this property."""
    form: Elementwise | None = getattr(phi, "elementwise", None)
    return form


@runtime_checkable
class Attention(Protocol):
    """A mechanism: it maps (Q, K, V) to an output as long as Q."""

    def __call__(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]: ...
