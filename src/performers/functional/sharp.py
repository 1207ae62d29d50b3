"""Sharper features of the softmax kernel: exact identities, and the best of a family of estimators.

The variance of positive features grows like exp(‖q + k‖²). Three steps lower it without changing
what is estimated (DESIGN.md, Sharper than the paper):

    shift     q·k = (q − a)·(k − b) + a·(k − b) + b·q, for any a and b
    balance   q·k = (M q)·(M⁻ᵀ k), for any invertible M
    optimal   E[f(ω, q) f(ω, k)] = exp(q·k), for f(ω, x) = Π_i (1 − 4A_i)^¼ ·
              exp(A_i ω_i² + √(1 − 4A_i) ω_i x_i − x_i²/2) and any A_i < ¼

a and b are the means of queries and keys. M gives both the same diagonal covariance, which
minimizes E‖q + k‖². A_i minimizes the expected variance of coordinate i, or of all together
("isotropic", FAVOR++). Only the coordinates that vary most have an A_i of their own, the others
have one in common: that is as sharp, and then the products with ω, which are orthogonal, nearly
have ‖x‖² (`_norm_by_products`). In the moments a key is weighted by the attention that it receives:
attention is dominated by pairs with large kernel values, and the keys of such pairs have another
mean than all keys.

Where all keys are estimated, the error of attention is smaller than that of one kernel value,
because the normalizer divides out what the estimates of one query have in common. To first order in
the norms the covariance of two estimates is (q + k)·(q + k'), of which only k·k' remains. So it
pays to let M make queries longer than keys (`QUERY_RATIO`). It does not pay beside a window: exact
scores in the normalizer have no errors, so the errors that the estimates share do not cancel.

Source: Likhosherstov et al. 2022, "Chefs' random tables" (optimal positive features, Theorem 3.2);
per coordinate, the idea of Likhosherstov et al. 2023, "Dense-exponential random features".
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.derivatives import is_traced
from performers.checks import check_choice
from performers.functional.autocast import without_autocast
from performers.functional.fingerprint import fingerprint
from performers.functional.moments import Moments
from performers.typing import FeatureMap, Features, LogLinearSide

__all__ = [
    "OPTIMAL",
    "QUERY_RATIO",
    "Reparametrization",
    "ReparametrizedFeatures",
    "optimal_exponent",
    "sharpen",
]

OPTIMAL = ("coordinate", "isotropic", "none")

# Directions in which the data hardly vary get at least this share of the mean variance.
VARIANCE_FLOOR = 1e-4

# So many coordinates have an exponent of their own, or a quarter of them less one. With one column
# more, of what is linear, that is a number which suits products of matrices.
LEADING = 15

# Queries are made this many times as long as keys where all keys are estimated. Best at weak norms
# and at 1024 projections; with fewer projections a little more would be a little better.
QUERY_RATIO = 2.0


class Reparametrization(NamedTuple):
    """a, b, M, M⁻ᵀ and A of the module's docstring, with leading dimensions for the heads.

    M and M⁻ᵀ cancel each other only up to rounding, so they are kept in the precision of the
    moments, which is float64 for a calibration.
    """

    query_shift: Float[Tensor, "*batch dim"]
    key_shift: Float[Tensor, "*batch dim"]
    query_map: Float[Tensor, "*batch dim dim"]
    key_map: Float[Tensor, "*batch dim dim"]
    exponent: Float[Tensor, "*batch dim"]

    @classmethod
    def identity(cls, *batch: int, dim: int) -> Reparametrization:
        """The reparametrization that changes nothing, that is, plain positive features."""
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
    """The reparametrization with the sharpest features for queries and keys with these moments.

    `query_ratio`: balance makes queries this many times as long as keys. 1 is best for kernel
    values and beside a window, `QUERY_RATIO` for attention without a window.

    `optimal`: "coordinate" (an A for each of the coordinates that vary most, and one for the
    others), "isotropic" (one A, FAVOR++) or "none" (A = 0, the paper). Without data, or if the data
    do not vary, the result is the identity. Any reparametrization gives an unbiased estimate;
    another one is only less sharp.

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
        # (√r M q)·(M⁻ᵀ k / √r) is still q·k.
        query_map, key_map = query_map * query_ratio**0.5, key_map / query_ratio**0.5
        # Data without any variance determine no M. Then M is the identity.
        is_found = is_found & (_mean_variance(queries) > 0) & (_mean_variance(keys) > 0)
        query_map = torch.where(is_found[..., None, None], query_map, eye)
        key_map = torch.where(is_found[..., None, None], key_map, eye)
    # E(q_i + k_i)² of each mapped coordinate, as if queries and keys were independent: the square
    # of the mean, plus both variances.
    mean = _mapped(query_map, queries.mean - query_shift) + _mapped(key_map, keys.mean - key_shift)
    spread = mean.square()
    for matrix, covariance in ((query_map, queries.covariance), (key_map, keys.covariance)):
        variance = (matrix @ covariance * matrix).sum(dim=-1)  # the diagonal of M Σ Mᵀ
        spread = spread + variance.clamp(min=0)  # rounding may leave the smallest slightly below 0
    if optimal == "coordinate":
        least = spread.sort(dim=-1, descending=True).values[..., _num_leading(dim), None]
        is_leading = spread > least
        # the optimal A of several coordinates is that of their mean
        others = spread.masked_fill(is_leading, 0.0).sum(dim=-1, keepdim=True)
        others = others / (~is_leading).sum(dim=-1, keepdim=True)
        exponent = optimal_exponent(torch.where(is_leading, spread, others), dim=1)
    elif optimal == "isotropic":
        exponent = optimal_exponent(spread.sum(dim=-1, keepdim=True), dim=dim).expand_as(spread)
    else:
        exponent = torch.zeros_like(spread)
    return Reparametrization(query_shift, key_shift, query_map, key_map, exponent)


def optimal_exponent(spread: Float[Tensor, "*batch"], dim: int) -> Float[Tensor, "*batch"]:
    """A that minimizes the log-variance of optimal positive features at E‖q + k‖² = `spread`.

        A = (1 − 1/ρ) / 8,    ρ = (√((2s + d)² + 8ds) − 2s − d) / (4s)

    A is 0 at s = 0, and falls without bound as s grows.

    Source: Likhosherstov et al. 2022, Theorem 3.2.
    """
    # 1/ρ = 4s / (√… − 2s − d) = (√… + 2s + d) / (2d), without the cancellation at small s
    root = torch.hypot(2 * spread + dim, (8 * dim * spread).sqrt())
    return (1 - (root + 2 * spread + dim) / (2 * dim)) / 8


@dataclass(frozen=True)
class ReparametrizedFeatures:
    """φ for the softmax kernel with a reparametrization: E[φ(q)·φ(k)] = exp(q·k) for any
    reparametrization.

    x of shape (batch, heads, length, dim) meets a reparametrization with leading dimensions
    (heads,) or (batch, heads). ω must be Gaussian: "sphere" has another expectation.

    The first call prepares what features are computed from; later calls reuse it.
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
        """What φ(q) is computed from; the factor exp(b·q) of the shift belongs to the row."""
        return self._side("query", dtype)

    def key_side(self, dtype: torch.dtype) -> LogLinearSide:
        """What φ(k) is computed from; the factor exp(a·(k − b)) of the shift belongs to the row."""
        return self._side("key", dtype)

    def _side(self, name: str, dtype: torch.dtype) -> LogLinearSide:
        # Every tile has a graph of its own, and a compiler keeps what it has traced.
        if self.omega.requires_grad or torch.compiler.is_compiling():
            return self._new_side(name, dtype)
        if (name, dtype) not in self._sides:
            # Or training could not use what decoding has made, nor float32 what autocast rounded.
            with torch.inference_mode(False), without_autocast(self.omega):
                self._sides[name, dtype] = self._new_side(name, dtype)
        return self._sides[name, dtype]

    def _new_side(self, name: str, dtype: torch.dtype) -> LogLinearSide:
        a, b, query_map, key_map, exponent = self.reparametrization
        stretch = (1 - 4 * exponent).sqrt()
        # log of Π_i (1 − 4A_i)^¼ / √m, as stretch is √(1 − 4A).
        constant = stretch.log().sum(dim=-1) / 2 - math.log(len(self.omega)) / 2
        if name == "query":
            # The factor exp(b·q): b·q = b·(q − a) + a·b, `linear` and a part of the constant.
            parts = a, b, query_map, constant + (a * b).sum(dim=-1)
        else:
            parts = b, a, key_map, constant
        shift, other_shift, matrix, constant = (part.to(dtype) for part in parts)
        stretch, omega = stretch.to(dtype).unsqueeze(-2), self.omega.to(dtype)
        # The term Σ_i A_i ω_i² depends on the feature alone.
        tilt = exponent.to(dtype).unsqueeze(-2) @ omega.square().mT
        lengths, surplus = self._norm_by_products(matrix, dtype)
        return LogLinearSide(
            directions=omega * stretch,
            constant=constant[..., None, None],
            tilt=tilt.squeeze(-2),
            shift=shift.unsqueeze(-2),
            matrix=matrix.mT,
            linear=other_shift.unsqueeze(-2),
            lengths=lengths,
            surplus=surplus,
        )

    @functools.cached_property
    def _skew(self) -> float:
        """The largest cosine between two of the first dim ω."""
        axes = F.normalize(self.omega[: self.omega.shape[1]].double())
        return float((axes @ axes.mT - torch.eye(len(axes)).to(axes)).abs().max())

    def _norm_by_products(
        self, matrix: Float[Tensor, "*heads dim dim"], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """`lengths` and `surplus` of a side, if the first dim ω are orthogonal as far as `dtype`
        shows, or float32, and all but the leading coordinates have one exponent.

        Their products ω_m·(B y), B being the stretch, have ‖B y‖² = Σ_m (ω_m·B y / ‖ω_m‖)². With b
        the common stretch, that is b² ‖y‖² and, of leading coordinates, Σ_i (B_i² − b²) y_i².
        """
        exponent, dim = self.reparametrization.exponent, self.omega.shape[1]
        # Only the operator for processors has a use for it, and to look would wait for a device.
        is_blind = self.omega.device.type != "cpu" or self.omega.requires_grad or is_traced()
        if is_blind or len(self.omega) < dim:
            return None, None
        few = _num_leading(dim)
        exponent, place = exponent.sort(dim=-1)
        common = exponent[..., few, None]
        # to bfloat16 whatever is drawn would look orthogonal
        least = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        is_orthogonal = self._skew <= dim * least
        if not (is_orthogonal and (exponent[..., few:] == common).all()):
            return None, None
        lengths = self.omega[:dim].norm(dim=-1) * (1 - 4 * common).sqrt()
        # B_i² / b² − 1; leading coordinates have the smallest A
        excess = 4 * (common - exponent[..., :few]) / (1 - 4 * common)
        rows = place[..., :few, None].expand(*place.shape[:-1], few, dim)
        surplus = matrix.gather(-2, rows) * excess.sqrt().unsqueeze(-1)
        return lengths.unsqueeze(-2).to(dtype), surplus.mT.to(dtype)


def _num_leading(dim: int) -> int:
    return min(max(LEADING, dim // 4 - 1), dim - 1)


def _regular(moments: Moments) -> Tensor:
    """The covariance, shrunk toward a multiple of the identity so that it can be inverted.

    The identity has the weight of one more vector among `count`.
    """
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
    and Σ_k. Also returns whether they were found: they are not where rounding has left Σ_q
    indefinite, or where numbers are so large that their product overflows.

        Σ_q = C Cᵀ,    Cᵀ Σ_k C = U Λ Uᵀ,    M = Λ^¼ Uᵀ C⁻¹,    M⁻ᵀ = Λ^(−¼) Uᵀ Cᵀ

    Both covariances become Λ^½. An axis, a column of U, has no sign of its own. It gets the one
    that makes the sum of cubes of its components positive. So rounding does not turn it around,
    and with it every feature: padding and the rest of a batch change the order of sums.

    Source: Laub et al. 1987, which balances the two Gramians of a control system so.
    """
    factor, failure = torch.linalg.cholesky_ex(query_covariance)
    product = factor.mT @ key_covariance @ factor
    is_found = (failure == 0) & product.isfinite().flatten(-2).all(dim=-1)
    values, axes = torch.linalg.eigh(product.where(is_found[..., None, None], 0.0))
    axes = axes * torch.where(axes.pow(3).sum(dim=-2, keepdim=True) < 0, -1.0, 1.0)
    # rounding may leave the smallest eigenvalues at or below 0
    least = values.amax(dim=-1, keepdim=True) * torch.finfo(values.dtype).eps
    stretch = values.clamp(min=least).pow(0.25).unsqueeze(-1)
    query_map = stretch * torch.linalg.solve_triangular(factor, axes.mT, upper=False, left=False)
    return query_map, (factor @ axes).mT / stretch, is_found


def _mapped(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
