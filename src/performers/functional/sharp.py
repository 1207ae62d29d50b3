"""Sharper features of the softmax kernel: exact identities, and the best of a family of estimators.

The variance of positive features grows like exp(‖q + k‖²). Three steps lower it, none changes what
is estimated (DESIGN.md, Sharper than the paper):

    shift     q·k = (q − a)·(k − b) + a·(k − b) + b·q, for any a and b
    balance   q·k = (M q)·(M⁻ᵀ k), for any invertible M
    optimal   E[f(ω, q) f(ω, k)] = exp(q·k), for f(ω, x) = Π_i (1 − 4A_i)^¼ ·
              exp(A_i ω_i² + √(1 − 4A_i) ω_i x_i − x_i²/2) and any A_i < ¼

a and b are the means of queries and keys. M gives both the same diagonal covariance, which
minimizes E‖q + k‖². A_i minimizes the expected variance of coordinate i, or of all together
("isotropic", FAVOR++). A key counts by the attention that it receives: what attention sums up are
the kernel values of such pairs, and they lie elsewhere than a query and a key at random.

The error of attention that is all estimated is not that of one kernel value: the normalizer divides
out what the estimates of one query have in common. Of Cov ≈ (q + k)·(q + k'), the first order in
the norms, only k·k' is left, so it pays to make queries longer than keys by M (`QUERY_RATIO`). It
does not pay where exact scores of a window share the normalizer: beside them it does not cancel.

Source: Likhosherstov et al. 2022, "Chefs' random tables" (optimal positive features, Theorem 3.2);
per coordinate, the idea of Likhosherstov et al. 2023, "Dense-exponential random features".
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.checks import check_choice
from performers.functional.fingerprint import fingerprint
from performers.typing import FeatureMap, Features, LogLinearSide

__all__ = [
    "OPTIMAL",
    "QUERY_RATIO",
    "Moments",
    "Reparametrization",
    "ReparametrizedFeatures",
    "optimal_exponent",
    "received_attention",
    "sampled",
    "sharpen",
]

OPTIMAL = ("coordinate", "isotropic", "none")

# Directions in which the data hardly vary are given this share of the mean variance.
VARIANCE_FLOOR = 1e-4

# How many times as long as keys to make queries where all of attention is estimated. Best at weak
# norms and at 1024 projections; with fewer projections a little more would be a little better.
QUERY_RATIO = 2.0

# Statistics of a sequence are those of this many of its positions. A prime, so that evenly spaced
# ones meet every phase of whatever is periodic in the sequence, such as the rows of an image.
SAMPLED_POSITIONS = 997

# With this many queries of a sequence the attention that keys receive is measured. All of them make
# features of a pretrained model no sharper.
SAMPLED_QUERIES = 32


def sampled(
    x: Float[Tensor, "batch heads length dim"],
    mask: Bool[Tensor, "batch length"] | None = None,
    count: int = SAMPLED_POSITIONS,
) -> tuple[Float[Tensor, "batch heads sample dim"], Bool[Tensor, "batch sample"] | None]:
    """`count` positions of each sequence, evenly spaced among those that the mask shows, or all of
    these where they are no more; and which of the sample are such positions, the others being 0.

    Neither what the mask hides nor the other sequences of the batch change which they are.
    """
    length = x.shape[2]
    rank = torch.arange(min(count, length), device=x.device)
    if mask is None:
        if length <= count:
            return x, None
        return x.index_select(2, (2 * rank + 1) * length // (2 * count)), None
    shown = mask.sum(dim=1, keepdim=True)
    chosen = shown.clamp(max=count)
    # the middle of each of `chosen` equal parts of the positions shown
    place = (2 * rank + 1) * shown // (2 * chosen).clamp(min=1)
    index = (~mask).byte().argsort(dim=1, stable=True).gather(1, place)
    mask = rank < chosen
    x = x.take_along_dim(index[:, None, :, None], dim=2)
    return x.masked_fill_(~mask[:, None, :, None], 0.0), mask


@dataclass(frozen=True)
class Moments:
    """Number, weighted mean and covariance of vectors, per head; batches merge exactly."""

    count: Float[Tensor, "*#batch"]
    mean: Float[Tensor, "*batch dim"]
    covariance: Float[Tensor, "*batch dim dim"]

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "batch heads length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        weight: Float[Tensor, "batch heads length"] | None = None,
    ) -> Moments:
        """Moments of each head of each sequence, over the positions that the mask shows; the others
        must be finite.

        `weight`: how much each of these counts, on any scale. None: all the same. Sums are taken of
        deviations from the mean, in float32 at least.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        shown = x.new_ones(len(x), 1, x.shape[2], 1)
        if mask is not None:
            shown = mask[:, None, :, None].to(x.dtype)
        share = shown if weight is None else shown * weight.detach().to(x.dtype).unsqueeze(-1)
        total = share.sum(dim=2, keepdim=True)
        share = share / total.where(total > 0, 1.0)
        mean = share.mT @ x
        half = (x - mean).mul_(share.sqrt())
        count = shown.sum(dim=2).squeeze(-1).expand(x.shape[:2])
        return cls(count, mean.squeeze(2), half.mT @ half)

    def scaled(self, factor: float) -> Moments:
        """The moments of the vectors times a factor."""
        return Moments(self.count, self.mean * factor, self.covariance * factor**2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of vectors together (Chan et al. 1979)."""
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[..., None]
        difference = other.mean - self.mean
        outer = difference.unsqueeze(-1) * difference.unsqueeze(-2)
        share_of_matrix = share.unsqueeze(-1)
        return Moments(
            count,
            self.mean + share * difference,
            (1 - share_of_matrix) * self.covariance
            + share_of_matrix * other.covariance
            + share_of_matrix * (1 - share_of_matrix) * outer,
        )

    def over_batch(self) -> Moments:
        """The moments of all sequences of the batch together."""
        total = Moments(*(part.new_zeros(part.shape[1:]) for part in vars(self).values()))
        for row in zip(*vars(self).values(), strict=True):
            total = total.merge(Moments(*row))
        return total


def received_attention(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch heads length dim"],
    query_mask: Bool[Tensor, "batch rows"] | None = None,
    key_mask: Bool[Tensor, "batch length"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "batch heads length"]:
    """Σ_i softmax_j(scale q_i·k_j) of each key j, over 32 queries: its weight in all outputs
    together.

    The queries are a sample of those that the mask shows. Hidden keys, which must be finite,
    receive nothing. Attention is bidirectional: a causal mask makes no difference to how sharp the
    features of causal attention become.

    Cost: O(length · dim) per head, an eighth of what 256 features of the keys cost.
    """
    query, shown = sampled(query.detach(), query_mask, SAMPLED_QUERIES)
    scores = (query * scale) @ key.detach().mT
    if key_mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill_(~key_mask[:, None, None, :], lowest)
    attention = scores.softmax(dim=-1)
    if shown is not None:
        attention = attention * shown[:, None, :, None]
    return attention.sum(dim=2)


class Reparametrization(NamedTuple):
    """a, b, M, M⁻ᵀ and A of the module's docstring; leading dimensions are those of the heads.

    M and M⁻ᵀ undo each other only to the precision in which they are kept: that of the moments,
    which is float64 for a calibration.
    """

    query_shift: Float[Tensor, "*batch dim"]
    key_shift: Float[Tensor, "*batch dim"]
    query_map: Float[Tensor, "*batch dim dim"]
    key_map: Float[Tensor, "*batch dim dim"]
    exponent: Float[Tensor, "*batch dim"]

    @classmethod
    def identity(cls, *batch: int, dim: int) -> Reparametrization:
        """The one that changes nothing: plain positive features."""
        zeros = torch.zeros(*batch, dim, dtype=torch.float64, device="cpu")
        eye = torch.eye(dim, dtype=torch.float64, device="cpu").expand(*batch, dim, dim)
        return cls(zeros, zeros.clone(), eye.clone(), eye.clone(), zeros.clone())


def sharpen(
    queries: Moments,
    keys: Moments,
    *,
    shift: bool = True,
    balance: bool = True,
    optimal: str = "coordinate",
    query_ratio: float = 1.0,
) -> Reparametrization:
    """The reparametrization that suits queries and keys with these moments.

    `query_ratio`: balance makes queries this many times as long as keys. 1 is best for kernel
    values and beside a window, `QUERY_RATIO` for attention without one.

    `optimal`: "coordinate" (an A for each), "isotropic" (one A, FAVOR++) or "none" (A = 0, the
    paper). Where nothing can be learned, from no data or data that do not vary, it is the identity:
    any reparametrization is correct, only less sharp.

    Cost: one Cholesky and one eigendecomposition of dim × dim per head, in the precision of the
    moments.
    """
    check_choice("optimal", optimal, OPTIMAL)
    dim = queries.mean.shape[-1]
    query_shift, key_shift = queries.mean, keys.mean
    if not shift:
        query_shift, key_shift = torch.zeros_like(query_shift), torch.zeros_like(key_shift)
    query_covariance, key_covariance = _regular(queries), _regular(keys)
    eye = torch.eye(dim, dtype=query_shift.dtype, device=query_shift.device)
    query_map = key_map = eye.expand_as(query_covariance)
    if balance:
        query_map, key_map, is_found = _balancing_maps(query_covariance, key_covariance)
        query_map, key_map = query_map * query_ratio**0.5, key_map / query_ratio**0.5
        is_found = is_found & (_mean_variance(queries) > 0) & (_mean_variance(keys) > 0)
        query_map = torch.where(is_found[..., None, None], query_map, eye)
        key_map = torch.where(is_found[..., None, None], key_map, eye)
    # E(q_i + k_i)² of the mapped coordinates, queries and keys independent of each other
    mean = _mapped(query_map, queries.mean - query_shift) + _mapped(key_map, keys.mean - key_shift)
    spread = mean.square()
    for matrix, covariance in ((query_map, queries.covariance), (key_map, keys.covariance)):
        variance = (matrix @ covariance * matrix).sum(dim=-1)  # the diagonal of M Σ Mᵀ
        spread = spread + variance.clamp(min=0)  # rounding may leave the least below 0
    if optimal == "coordinate":
        exponent = optimal_exponent(spread, dim=1)
    elif optimal == "isotropic":
        exponent = optimal_exponent(spread.sum(dim=-1, keepdim=True), dim=dim).expand_as(spread)
    else:
        exponent = torch.zeros_like(spread)
    return Reparametrization(query_shift, key_shift, query_map, key_map, exponent)


def optimal_exponent(spread: Float[Tensor, "*batch"], dim: int) -> Float[Tensor, "*batch"]:
    """A that minimizes the log-variance of optimal positive features at E‖q + k‖² = `spread`.

        A = (1 − 1/ρ) / 8,    ρ = (√((2s + d)² + 8ds) − 2s − d) / (4s)

    A = 0 at s = 0, and falls without bound as s grows.

    Source: Likhosherstov et al. 2022, Theorem 3.2.
    """
    # 1/ρ = 4s / (√… − 2s − d) = (√… + 2s + d) / (2d), without the cancellation at small s
    root = torch.hypot(2 * spread + dim, (8 * dim * spread).sqrt())
    return (1 - (root + 2 * spread + dim) / (2 * dim)) / 8


@dataclass(frozen=True)
class ReparametrizedFeatures:
    """φ for the softmax kernel with a reparametrization: E[φ(q)·φ(k)] = exp(q·k) for each.

    x of shape (batch, heads, length, dim) meets a reparametrization with leading dimensions
    (heads,) or (batch, heads). ω must be Gaussian: "sphere" has another expectation.

    What features are computed from is made by the first call, and ready for those after it.
    """

    omega: Float[Tensor, "num_projections dim"]
    reparametrization: Reparametrization
    _sides: dict[tuple[str, torch.dtype], LogLinearSide] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def fingerprint(self) -> tuple[object, ...] | None:
        """See `performers.functional.fingerprint`."""
        return fingerprint("sharp", (self.omega, *self.reparametrization))

    @property
    def num_features(self) -> int:
        return len(self.omega)

    @property
    def default_scale(self) -> float:
        return float(self.omega.shape[1] ** -0.5)

    @property
    def is_nonnegative(self) -> bool:
        return True

    @property
    def is_log_linear(self) -> bool:
        return True

    @property
    def is_softmax(self) -> bool:
        return True

    def fitted(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        *,
        scale: float,
        is_streaming: bool,
    ) -> FeatureMap:
        return self

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.query_side(x.dtype).log_linear(x).features()

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.key_side(x.dtype).log_linear(x).features()

    def query_side(self, dtype: torch.dtype) -> LogLinearSide:
        """Of φ(q); the factor exp(b·q) of the shift goes to the row."""
        return self._side("query", dtype)

    def key_side(self, dtype: torch.dtype) -> LogLinearSide:
        """Of φ(k); the factor exp(a·(k − b)) of the shift goes to the row."""
        return self._side("key", dtype)

    def _side(self, name: str, dtype: torch.dtype) -> LogLinearSide:
        # each tile's graph is its own, and a compiler keeps what it has traced
        if self.omega.requires_grad or torch.compiler.is_compiling():
            return self._new_side(name, dtype)
        if (name, dtype) not in self._sides:
            with torch.inference_mode(False):  # or training could not use what decoding has made
                self._sides[name, dtype] = self._new_side(name, dtype)
        return self._sides[name, dtype]

    def _new_side(self, name: str, dtype: torch.dtype) -> LogLinearSide:
        a, b, query_map, key_map, exponent = self.reparametrization
        stretch = (1 - 4 * exponent).sqrt()
        constant = stretch.log().sum(dim=-1) / 2 - math.log(len(self.omega)) / 2
        if name == "query":
            # b·q = b·(q − a) + a·b, and a·b has its other half in the keys
            parts = a, b, query_map, constant + (a * b).sum(dim=-1)
        else:
            parts = b, a, key_map, constant
        shift, other_shift, matrix, constant = (part.to(dtype) for part in parts)
        stretch, omega = stretch.to(dtype).unsqueeze(-2), self.omega.to(dtype)
        tilt = exponent.to(dtype).unsqueeze(-2) @ omega.square().mT
        return LogLinearSide(
            directions=omega * stretch,
            constant=constant[..., None, None],
            tilt=tilt.squeeze(-2),
            shift=shift.unsqueeze(-2),
            matrix=matrix.mT,
            linear=other_shift.unsqueeze(-2),
        )


def _regular(moments: Moments) -> Tensor:
    """The covariance, shrunk toward a ball as if by one more vector, so that it can be inverted."""
    variance = _mean_variance(moments)
    share = (1 / (moments.count + 1)).clamp(min=VARIANCE_FLOOR)
    regular = (1 - share)[..., None, None] * moments.covariance
    ball = share * variance.where(variance > 0, 1.0)
    regular.diagonal(dim1=-2, dim2=-1).add_(ball.unsqueeze(-1))
    return regular


def _mean_variance(moments: Moments) -> Tensor:
    dim = moments.mean.shape[-1]
    return moments.covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / dim


def _balancing_maps(
    query_covariance: Tensor, key_covariance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """M and M⁻ᵀ with M Σ_q Mᵀ = M⁻ᵀ Σ_k M⁻¹, diagonal: MᵀM is the matrix geometric mean of Σ_q⁻¹
    and Σ_k. And whether they were found: not where rounding has left Σ_q indefinite, or numbers so
    large that their product overflows.

        Σ_q = C Cᵀ,    Cᵀ Σ_k C = U Λ Uᵀ,    M = Λ^¼ Uᵀ C⁻¹,    M⁻ᵀ = Λ^(−¼) Uᵀ Cᵀ

    Both covariances become Λ^½. An axis, a column of U, has no sign of its own. It gets the one
    that makes the sum of cubes of its components positive, so that rounding does not turn it, nor
    with it every feature: padding and the rest of a batch change the order of sums.

    Source: Laub et al. 1987, which balances the two Gramians of a control system so.
    """
    factor, failure = torch.linalg.cholesky_ex(query_covariance)
    product = factor.mT @ key_covariance @ factor
    is_found = (failure == 0) & product.isfinite().flatten(-2).all(dim=-1)
    values, axes = torch.linalg.eigh(product.where(is_found[..., None, None], 0.0))
    axes = axes * torch.where(axes.pow(3).sum(dim=-2, keepdim=True) < 0, -1.0, 1.0)
    # rounding may leave the least eigenvalues at or below 0
    least = values.amax(dim=-1, keepdim=True) * torch.finfo(values.dtype).eps
    stretch = values.clamp(min=least).pow(0.25).unsqueeze(-1)
    query_map = stretch * torch.linalg.solve_triangular(factor, axes.mT, upper=False, left=False)
    return query_map, (factor @ axes).mT / stretch, is_found


def _mapped(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
