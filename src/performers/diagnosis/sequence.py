"""One sequence, and what attention over it gets wrong: sums by definition, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.functional.favor import favor_attention
from performers.functional.sharp import ReparametrizedFeatures
from performers.nn.estimators import ESTIMATORS
from performers.nn.feature_maps import SoftmaxFeatures
from performers.nn.sharp import SharpFeatures
from performers.theory import log_joint_moment_optimal, mse_attention
from performers.typing import FeatureMap

__all__ = ["Sequence"]

# The closed form takes length² numbers per query, so it is averaged over this many queries, evenly
# spaced.
QUERIES = 8


@dataclass(frozen=True)
class Sequence:
    """One sequence of a batch. Its methods compute what `diagnose` reports, one row per head.

    `query`, `key`, `value` and `mask` are as attention takes them, a batch of one. The other fields
    are for sums by definition: real queries and keys alone, in float64.
    """

    query: Float[Tensor, "1 heads query_length dim"]
    key: Float[Tensor, "1 key_heads key_length dim"]
    value: Float[Tensor, "1 key_heads key_length value_dim"]
    mask: Bool[Tensor, "1 key_length"] | None
    is_causal: bool
    scale: float
    window_size: int | None
    queries: Int[Tensor, " queries"]
    keys: Int[Tensor, " keys"]
    visible: Bool[Tensor, "queries keys"]
    near: Bool[Tensor, "queries keys"]
    log_weights: Float[Tensor, "heads queries keys"]
    real_value: Float[Tensor, "heads keys value_dim"]

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        key_padding_mask: Tensor | None,
        scale: float,
        window_size: int | None,
        row: int,
    ) -> Sequence:
        query, key, value = (x[row : row + 1] for x in (query, key, value))
        mask = None if key_padding_mask is None else key_padding_mask[row : row + 1]
        queries, keys = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
        if mask is not None:
            is_self_attention = len(queries) == len(keys)
            keys = keys[mask[0]]
            queries = keys if is_self_attention else queries
        real = (query[0, :, queries], key[0, :, keys], value[0, :, keys])
        for name, x in zip(("query", "key", "value"), real, strict=True):
            finite = x.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                heads = ", ".join(map(str, (~finite).nonzero().flatten().tolist()))
                raise ValueError(
                    f"{name} must be finite to be diagnosed: sequence {row} has NaN or infinity in "
                    f"head {heads}."
                )
        group = query.shape[1] // key.shape[1]
        real_query, real_key, real_value = (x.double() for x in real)
        distance = queries[:, None] - keys
        visible = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
        near = torch.zeros_like(visible)
        if window_size is not None:  # self-attention: blocks are counted in real tokens alone
            block = torch.arange(len(keys), device=keys.device) // window_size
            near = visible & ((block[:, None] - block).abs() <= 1)
        # Exact attention with all pairs, in float64: errors are measured against this.
        scores = real_query @ real_key.repeat_interleave(group, dim=0).mT * scale
        return cls(
            query=query,
            key=key,
            value=value,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            window_size=window_size,
            queries=queries,
            keys=keys,
            visible=visible,
            near=near,
            log_weights=scores.masked_fill(~visible, -torch.inf).log_softmax(dim=-1),
            real_value=real_value.repeat_interleave(group, dim=0),
        )

    def numbers(self, phi: SoftmaxFeatures | SharpFeatures) -> dict[str, Tensor]:
        """The fields of `HeadDiagnosis` that need no search for m, as far as there are any."""
        fitted = phi.fitted(
            self.query, self.key, self.mask, scale=self.scale, is_streaming=self.is_causal
        )
        query, key = self._rows()
        mapped_query, mapped_key = query, key
        if isinstance(fitted, ReparametrizedFeatures):
            mapped_query = fitted.query_side(query.dtype).log_linear(query).inputs
            mapped_key = fitted.key_side(key.dtype).log_linear(key).inputs
        mapped_query, mapped_key = self._by_head(mapped_query, mapped_key)
        query_norm, key_norm = (x.norm(dim=-1) for x in self._by_head(query, key))
        # Queries and keys taken independently: E‖q + k‖² = E‖q‖² + E‖k‖² + 2 E q · E k
        squares = (x.square().sum(dim=-1).mean(dim=-1) for x in (mapped_query, mapped_key))
        product = (mapped_query.mean(dim=1) * mapped_key.mean(dim=1)).sum(dim=-1)
        count = self.visible.sum(dim=1, keepdim=True).clamp(min=1)
        found = {
            "observed_error": self.observed_error(phi),
            "uniform_error": self._relative_error(self.visible.double() / count @ self.real_value),
            "effective_features": self._effective_features(fitted, query, key),
            "query_norm": query_norm.mean(dim=1),
            "largest_query_norm": query_norm.amax(dim=1),
            "key_norm": key_norm.mean(dim=1),
            "largest_key_norm": key_norm.amax(dim=1),
            "mean_square_sum": sum(squares) + 2 * product,
        }
        if _has_closed_form(phi):
            found["expected_error"] = self._expected_error(phi, fitted, mapped_query, mapped_key)
        return found

    def observed_error(self, phi: SoftmaxFeatures | SharpFeatures) -> Float[Tensor, " heads"]:
        """The relative error of attention with these features."""
        out = favor_attention(
            self.query,
            self.key,
            self.value,
            phi,
            self.is_causal,
            self.mask,
            self.scale,
            enable_gqa=True,
            window_size=self.window_size,
        )
        return self._relative_error(out[0, :, self.queries].double())

    def _expected_error(
        self,
        phi: SoftmaxFeatures | SharpFeatures,
        fitted: FeatureMap,
        query: Float[Tensor, "heads queries dim"],
        key: Float[Tensor, "heads keys dim"],
    ) -> Float[Tensor, " heads"]:
        """The root of the closed form's mean over evenly spaced queries, relative to ‖exact‖."""
        count = len(self.queries)
        chosen = torch.linspace(0, count - 1, min(QUERIES, count)).long()
        squares = [
            mse_attention(
                self.log_weights[:, i],
                self.real_value,
                self._log_joint_moment(phi, fitted, query[:, i], key),
                phi.num_projections,
                self.near[i],
            )
            for i in chosen.tolist()
        ]
        exact = self.log_weights[:, chosen].exp() @ self.real_value
        return _ratio(torch.stack(squares).sum(dim=0).sqrt(), exact.flatten(1).norm(dim=1))

    def _log_joint_moment(
        self,
        phi: SoftmaxFeatures | SharpFeatures,
        fitted: FeatureMap,
        query: Float[Tensor, "heads dim"],
        key: Float[Tensor, "heads keys dim"],
    ) -> Float[Tensor, "heads keys keys"]:
        if isinstance(fitted, ReparametrizedFeatures):
            exponent = fitted.reparametrization.exponent
            exponent = exponent[0] if exponent.ndim == 3 else exponent
            repeats = len(query) // len(exponent)
            return log_joint_moment_optimal(query, key, exponent.repeat_interleave(repeats, dim=0))
        assert isinstance(phi, SoftmaxFeatures), "sharp features are fitted to a reparametrization"
        log_joint_moment = ESTIMATORS[phi.estimator].log_joint_moment
        assert log_joint_moment is not None, "`_has_closed_form` was asked"
        return log_joint_moment(query, key)

    def _effective_features(
        self,
        fitted: FeatureMap,
        query: Float[Tensor, "1 key_heads rows dim"],
        key: Float[Tensor, "1 key_heads keys dim"],
    ) -> Float[Tensor, " heads"]:
        """(Σ_m u_m)² / Σ_m u_m², averaged over the queries that have an estimated key."""
        query_features, key_features = fitted.query_features(query), fitted.key_features(key)
        exponent = key_features.exponent()
        # One frame per feature, the maximum over keys as in a softmax, which `weights` below adds
        # again.
        frame = exponent.amax(dim=2, keepdim=True)
        parts = (exponent - frame).exp()
        if key_features.values is not None:
            parts = parts * key_features.values
        _, parts = self._by_head(query, parts)
        # A 0/1 matrix in place of attention: each query sums the features of its estimated keys.
        parts = (self.visible & ~self.near).to(parts.dtype) @ parts  # [heads, queries, features]
        # A factor common to all features of a query cancels in the ratio. log_rows is such a
        # factor.
        weights = frame.expand(-1, -1, query.shape[2], fitted.num_features)
        if query_features.log_values is not None:
            weights = weights + query_features.log_values
        # The ratio does not change if all features of a query are divided by the largest.
        weights = (weights - weights.amax(dim=-1, keepdim=True)).exp()
        if query_features.values is not None:
            weights = weights * query_features.values
        parts = parts * self._by_head(weights, key)[0]
        square = parts.square().sum(dim=-1)
        effective = _ratio(parts.sum(dim=-1).square(), square)
        return _ratio(effective.sum(dim=1), (square > 0).sum(dim=1))

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Real queries and keys as φ takes them; those of one key head's queries in succession."""
        query, key = self.query[:, :, self.queries], self.key[:, :, self.keys]
        query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
        root = math.sqrt(self.scale)
        return query.double() * root, key.double() * root

    def _by_head(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Such queries and keys rearranged to (heads, queries, ·) and (heads, keys, ·)."""
        group = self.query.shape[1] // self.key.shape[1]
        # [1, key_heads, group · queries, ·] → [key_heads · group, queries, ·]
        rows = rows.unflatten(2, (group, -1)).flatten(0, 2)
        return rows, keys[0].repeat_interleave(group, dim=0)

    def _relative_error(self, out: Float[Tensor, "heads queries value_dim"]) -> Tensor:
        exact = self.log_weights.exp() @ self.real_value
        return _ratio((out - exact).flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1))


def _has_closed_form(phi: SoftmaxFeatures | SharpFeatures) -> bool:
    """Whether the error of attention with these features is known without trying."""
    has_moment = (
        isinstance(phi, SharpFeatures) or ESTIMATORS[phi.estimator].log_joint_moment is not None
    )
    return has_moment and phi.distribution == "gaussian"


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 for 0 / 0."""
    return x / torch.where((x == 0) & (y == 0), 1.0, y)
