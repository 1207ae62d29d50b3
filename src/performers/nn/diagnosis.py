"""Is m enough? The error of linear attention on given queries, keys and values, and its causes."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_attention_inputs, check_count
from performers.functional.favor import favor_attention
from performers.functional.sharp import QUERY_RATIO, ReparametrizedFeatures
from performers.nn.feature_maps import SoftmaxFeatures
from performers.nn.sharp import SharpFeatures
from performers.theory import (
    log_joint_moment_hyperbolic,
    log_joint_moment_optimal,
    log_joint_moment_positive,
    log_joint_moment_trigonometric,
    mse_attention,
)
from performers.typing import FeatureMap

__all__ = ["COMPARED", "Diagnosis", "HeadDiagnosis", "compare", "diagnose", "recommendation"]

COMPARED = ("positive", "sharp", "sharp + window")

# The closed form takes length² numbers per query, so it is averaged over this many queries, evenly
# spaced.
QUERIES = 8


@dataclass(frozen=True)
class HeadDiagnosis:
    """One query head, averaged over the batch. Errors are relative: ‖out − exact‖ / ‖exact‖.

    observed_error:     with the feature map as it is, its own ω.
    expected_error:     the root of the closed form `theory.mse_attention` for independent ω. As
                        large as 1 or larger it only says that m is far too small. None for
                        distribution "sphere", which has no such form.
    uniform_error:      of averaging the visible values, what no estimate should be worse than.
    effective_features: (Σ_m u_m)² / Σ_m u_m², u_m the part of feature m in a query's normalizer:
                        how many features of the m carry the estimate. Keys in a window do not
                        count; 0 where no key is estimated.
    query_norm, …:      mean and largest ‖q‖ and ‖k‖, times √scale.
    mean_square_sum:    E‖q + k‖² over all pairs, in the coordinates of φ: sharp features lower it.
                        The variance grows like its exponential.
    predicted_projections: the m at which the closed form meets the target.
    smallest_projections:  the smallest m tried that met it; None where none did.
    """

    observed_error: float
    expected_error: float | None
    uniform_error: float
    effective_features: float
    query_norm: float
    largest_query_norm: float
    key_norm: float
    largest_key_norm: float
    mean_square_sum: float
    predicted_projections: float | None = None
    smallest_projections: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `str` makes a table of it."""

    heads: tuple[HeadDiagnosis, ...]
    num_projections: int
    target_error: float | None = None
    max_projections: int | None = None

    def mean(self, name: str) -> float:
        """The mean over heads of a number of `HeadDiagnosis`; infinite where one is missing."""
        numbers = [getattr(head, name) for head in self.heads]
        return sum(math.inf if x is None else x for x in numbers) / len(numbers)

    def __str__(self) -> str:
        columns = ["head", "observed", "expected", "uniform", f"of {self.num_projections}"]
        columns += ["|q|", "max", "|k|", "max", "E|q+k|²"]
        rows = [
            [str(index), *map(_number, astuple(head)[: len(columns) - 1])]
            for index, head in enumerate(self.heads)
        ]
        if self.target_error is not None:
            columns += ["m predicted", "m found"]
            for row, head in zip(rows, self.heads, strict=True):
                found = head.smallest_projections
                row.append(_number(head.predicted_projections))
                row.append(f"> {self.max_projections}" if found is None else str(found))
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (columns, *rows)
        ]
        legend = (
            "Errors are relative to exact attention; uniform: averaging the values; "
            f"of {self.num_projections}: features that carry the estimate."
        )
        if self.target_error is not None:
            legend += f" m predicted, found: for an error of {self.target_error:g}."
        return "\n".join([*lines, legend])


@torch.no_grad()
def diagnose(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: SoftmaxFeatures | SharpFeatures,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: int | None = None,
    target_error: float | None = None,
    max_projections: int = 8192,
) -> Diagnosis:
    """How well `favor_attention` with these arguments estimates softmax attention, head by head.

    `target_error`: find the smallest m for this relative error as well: from the closed form, and
    by trying m = 8, 11, 16, 23, … with new draws up to `max_projections`.

    Raises ValueError or TypeError for what attention refuses, for inputs that are not finite, and
    for feature maps of other kernels, which have no exact output to compare with.
    Cost: quadratic in the length, as exact attention is: O(length²) memory per head.

    >>> from performers import SoftmaxFeatures
    >>> query, key, value = torch.randn(3, 1, 2, 64, 16).unbind()
    >>> len(diagnose(query, key, value, SoftmaxFeatures(dim=16)).heads)
    2
    """
    if not isinstance(phi, SoftmaxFeatures | SharpFeatures):
        raise TypeError(
            "diagnose compares with softmax attention, so phi must be SoftmaxFeatures or "
            f"SharpFeatures, got {type(phi).__name__}."
        )
    scale = phi.default_scale if scale is None else scale
    check_attention_inputs(
        query,
        key,
        value,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    if target_error is not None and not target_error > 0:
        raise ValueError(f"target_error must be above 0, got {target_error!r}.")
    check_count("max_projections", max_projections)
    sequences = (
        _Sequence.of(query, key, value, is_causal, key_padding_mask, scale, window_size, row)
        for row in range(len(query))
    )
    cases = [sequence for sequence in sequences if sequence.visible.any()]
    if not cases:
        raise ValueError(
            "there must be a query that sees a key to diagnose attention: query is "
            f"{tuple(query.shape)}, key is {tuple(key.shape)}, and key_padding_mask must not hide "
            "every key."
        )

    def over_batch(numbers: list[Tensor]) -> list[float]:
        return torch.stack(numbers).mean(dim=0).tolist()

    by_sequence = [case.numbers(phi) for case in cases]
    per_head: dict[str, list[Any]] = {
        name: over_batch([numbers[name] for numbers in by_sequence]) for name in by_sequence[0]
    }
    if phi.distribution != "gaussian":
        per_head["expected_error"] = [None] * query.shape[1]
    if target_error is not None:
        per_head["predicted_projections"] = [
            None if error is None else phi.num_projections * (error / target_error) ** 2
            for error in per_head["expected_error"]
        ]
        found: list[int | None] = [None] * query.shape[1]
        for m in _ladder(max_projections):
            wider = _with_projections(phi, m)
            errors = over_batch([case.observed_error(wider) for case in cases])
            for head, error in enumerate(errors):
                if found[head] is None and error <= target_error:
                    found[head] = m
            if None not in found:
                break
        per_head["smallest_projections"] = found
    heads = (dict(zip(per_head, row, strict=True)) for row in zip(*per_head.values(), strict=True))
    return Diagnosis(
        tuple(HeadDiagnosis(**head) for head in heads),
        phi.num_projections,
        target_error,
        None if target_error is None else max_projections,
    )


def compare(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    num_projections: int = 256,
    window_size: int | None = 32,
    is_causal: bool = False,
    scale: float | None = None,
    target_error: float | None = None,
) -> dict[str, Diagnosis]:
    """`diagnose` for plain positive features, sharp ones, and sharp ones with a window, at one m.

    `window_size`: None for cross-attention, which has no window.

    Bidirectional: sharp features take the statistics of each sequence. Causal: those of the first
    half of the batch, and the other half is diagnosed; a batch of one serves for both.
    """
    dim, key_heads = key.shape[-1], key.shape[1]
    statistics = "calibrated" if is_causal else "call"
    positive = SoftmaxFeatures(dim, num_projections)
    sharp, beside_window = (
        SharpFeatures(dim, num_projections, key_heads, statistics, query_ratio=ratio)
        for ratio in (QUERY_RATIO, 1.0)
    )
    if is_causal:
        half = len(query) // 2
        seen = slice(half) if half else slice(None)
        for phi in (sharp, beside_window):
            phi.to(query.device).calibrate(query[seen], key[seen], scale=scale)
        query, key, value = query[half:], key[half:], value[half:]
    maps: tuple[SoftmaxFeatures | SharpFeatures, ...] = (positive, sharp, beside_window)
    windows = (None, None, window_size)
    return {
        name: diagnose(
            query,
            key,
            value,
            phi.to(query.device),
            is_causal,
            scale=scale,
            enable_gqa=True,
            window_size=window,
            target_error=target_error,
        )
        for name, phi, window in zip(COMPARED, maps, windows, strict=True)
    }


def recommendation(layers: dict[str, dict[str, Diagnosis]]) -> str:
    """What to use for these layers, from what `compare` found in each, in a few lines."""
    errors = {
        name: sum(layer[name].mean("observed_error") for layer in layers.values()) / len(layers)
        for name in COMPARED
    }
    lines = [
        "Mean error: " + ", ".join(f"{name} {_number(error)}" for name, error in errors.items())
    ]
    best = min(errors, key=lambda name: errors[name])
    lines.append(f"Lowest with {best} features.")
    hopeless = [
        layer
        for layer, found in layers.items()
        if found[best].mean("observed_error") >= found[best].mean("uniform_error")
    ]
    if hopeless:
        lines.append(
            f"Even so no better than averaging the values in {', '.join(hopeless)}: keep exact "
            "attention there, or train with features from the start."
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class _Sequence:
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
    ) -> _Sequence:
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
        """The fields of `HeadDiagnosis` that need no search for m."""
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
        return {
            "observed_error": self.observed_error(phi),
            "expected_error": self._expected_error(phi, fitted, mapped_query, mapped_key),
            "uniform_error": self._relative_error(self.visible.double() / count @ self.real_value),
            "effective_features": self._effective_features(fitted, query, key),
            "query_norm": query_norm.mean(dim=1),
            "largest_query_norm": query_norm.amax(dim=1),
            "key_norm": key_norm.mean(dim=1),
            "largest_key_norm": key_norm.amax(dim=1),
            "mean_square_sum": sum(squares) + 2 * product,
        }

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
        return JOINT_MOMENTS[phi.estimator](query, key)

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


JOINT_MOMENTS = {
    "positive": log_joint_moment_positive,
    "hyperbolic": log_joint_moment_hyperbolic,
    "trigonometric": log_joint_moment_trigonometric,
}


def _with_projections(
    phi: SoftmaxFeatures | SharpFeatures, num_projections: int
) -> SoftmaxFeatures | SharpFeatures:
    """The same features, calibration included, with another number of projections, newly drawn."""
    other = copy.deepcopy(phi)
    other.num_projections = num_projections
    other.omega = phi.num_redraws.new_empty(num_projections, phi.dim, dtype=torch.float32)
    other.redraw()
    return other


def _ladder(largest: int) -> Iterator[int]:
    """8, 11, 16, 23, …: each √2 times the one before."""
    return (
        round(2 ** (step / 2))
        for step in itertools.takewhile(lambda step: 2 ** (step / 2) <= largest, itertools.count(6))
    )


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 for 0 / 0."""
    return x / torch.where((x == 0) & (y == 0), 1.0, y)


def _number(x: float | int | None) -> str:
    if x is None:
        return "–"
    return f"{x:.3f}" if abs(x) < 10 else f"{x:.0f}" if abs(x) < 1e5 else f"{x:.0e}"
