"""`SharpFeatures`: softmax features that adapt to the means and covariances of queries and keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.checks import (
    check_attention_inputs,
    check_choice,
    check_count,
    check_feature_map,
    check_flags,
    check_number,
    check_tensor,
)
from performers.functional.moments import Moments, received_attention, sampled
from performers.functional.projections import PROJECTIONS
from performers.functional.sharp import OPTIMAL, Reparametrization, ReparametrizedFeatures, sharpen
from performers.nn.feature_maps import RandomFeatures
from performers.typing import FeatureMap, Features, LogLinearSide

__all__ = ["SharpFeatures"]

STATISTICS = ("calibrated", "call")


class _Ready(NamedTuple):
    """Features, and the versions of the buffers that they were made from. They hold the buffers, so
    that no other tensor can take the place of one unseen."""

    features: ReparametrizedFeatures
    versions: list[tuple[int, int]]


class SharpFeatures(RandomFeatures):
    """Positive features of the softmax kernel that adapt to the data, for a lower variance.

    `statistics`: "calibrated" uses what `calibrate` has seen; before it has seen anything these are
    plain positive features. "call" takes the statistics of every call from its own queries and
    keys, each sequence by itself: these are sharper, but for bidirectional attention only, because
    the statistics of a whole sequence tell earlier positions about later ones. Either way they are
    taken from at most 997 positions of a sequence, evenly spaced.
    `num_heads`: key heads; each has statistics of its own.
    `shift`, `balance`, `optimal`: the three steps of `performers.functional.sharp`, all on.
    `query_ratio`: how many times as long as keys balance makes queries. 1 is best beside a window
    and for the softmax normalizer, 2 for attention without a window.

    The statistics are buffers, saved with the weights, and keep their precision under `.half()`.
    Gradients do not flow through them, and need not: the estimate is unbiased whatever they are.

    Raises ValueError for unknown words or counts below 1.
    """

    query_shift: Tensor
    key_shift: Tensor
    query_map: Tensor
    key_map: Tensor
    exponent: Tensor

    def __init__(
        self,
        dim: int,
        num_projections: int = 256,
        num_heads: int = 1,
        statistics: str = "calibrated",
        shift: bool = True,
        balance: bool = True,
        optimal: str = "coordinate",
        query_ratio: float = 1.0,
        projection: str = "orthogonal",
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        check_count("num_heads", num_heads)
        check_choice("statistics", statistics, STATISTICS)
        check_choice("optimal", optimal, OPTIMAL)
        check_choice("projection", projection, PROJECTIONS)
        check_number("query_ratio", query_ratio)
        check_flags(shift=shift, balance=balance)
        super().__init__(dim, num_projections, projection, "gaussian", seed, layer)
        self.num_heads = num_heads
        self.statistics = statistics
        self.shift = shift
        self.balance = balance
        self.optimal = optimal
        self.query_ratio = query_ratio
        self._ready: _Ready | None = None
        for side in ("query", "key"):
            count = torch.zeros(num_heads, dtype=torch.float64, device="cpu")
            self.register_buffer(f"{side}_count", count)
            self.register_buffer(f"{side}_mean", count[:, None].repeat(1, dim))
            self.register_buffer(f"{side}_covariance", count[:, None, None].repeat(1, dim, dim))
        for name, part in Reparametrization.identity(num_heads, dim=dim)._asdict().items():
            self.register_buffer(name, part)

    @property
    def num_features(self) -> int:
        return self.num_projections

    @property
    def default_scale(self) -> float:
        return float(self.dim**-0.5)

    @property
    def is_softmax(self) -> bool:
        return True

    @property
    def is_nonnegative(self) -> bool:
        return True

    @property
    def is_log_linear(self) -> bool:
        return True

    @torch.no_grad()
    def calibrate(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
        scale: float | None = None,
    ) -> None:
        """Learn from queries and keys as attention gets them; each call adds to the statistics.

        `key_padding_mask` hides the padded queries too where there is one query per key.
        Raises ValueError where a visible query or key is not finite, naming the head.
        """
        scale = self.default_scale if scale is None else scale
        for name, x in (("query", query), ("key", key)):
            check_tensor(name, x, "batch, heads, length, dim")
        queries, keys = self._moments_of(query.double(), key.double(), key_padding_mask, scale)
        if key.shape[1] != self.num_heads:
            raise ValueError(
                f"calibration needs keys with {self.num_heads} heads, which these features were "
                f"made for: got {key.shape[1]}. Pass num_heads= to SharpFeatures."
            )
        # Both sides are checked before either is changed, so that a refused batch leaves no trace.
        batch = {"query": queries.over_batch(), "key": keys.over_batch()}
        for side, new in batch.items():
            finite = new.covariance.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                heads = ", ".join(map(str, (~finite).nonzero().flatten().tolist()))
                raise ValueError(
                    f"calibration needs finite numbers: layer {self.layer} got NaN or infinity in "
                    f"the {side} of head {heads}. Nothing was learned from this batch."
                )
        for side, new in batch.items():
            for name, part in vars(self._moments(side).merge(new)).items():
                getattr(self, f"{side}_{name}").copy_(part)
        self._learn(self._sharpened(self._moments("query"), self._moments("key")))

    def keep_heads(self, heads: slice) -> None:
        """Forget what was learned of other key heads than these, which stay here alone."""
        for name, buffer in self.of_heads().items():
            setattr(self, name, buffer[heads].clone())
        self.num_heads = len(self.query_shift)

    def of_heads(self) -> dict[str, Tensor]:
        """The buffers that have a row for each key head: what was learned of it."""
        drawn = {"omega", "num_redraws"}
        return {name: x for name, x in self.named_buffers(recurse=False) if name not in drawn}

    def reset_parameters(self) -> None:
        """Draw the first ω of this seed and layer, and forget all calibration."""
        super().reset_parameters()
        for side in ("query", "key"):
            for part in vars(self._moments(side)).values():
                part.zero_()
        self._learn(Reparametrization.identity(self.num_heads, dim=self.dim))

    def fitted(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        *,
        scale: float,
        is_streaming: bool,
    ) -> FeatureMap:
        """The features for one call, from the calibration or from the call's own statistics."""
        check_feature_map(query, self.dim, self.num_redraws.device)
        if self.statistics == "calibrated":
            # Not `in`: to a compiler with dynamic shapes, a tuple does not hold equal numbers.
            if self.num_heads != 1 and self.num_heads != key.shape[1]:
                raise ValueError(
                    f"these features were made for {self.num_heads} key heads and key has "
                    f"{key.shape[1]}. Pass num_heads= to SharpFeatures."
                )
            return self._calibrated()
        if is_streaming:
            raise ValueError(
                'statistics="call" would let a position see its future, so it cannot serve causal '
                'or streaming attention. Use statistics="calibrated" and calibrate().'
            )
        queries, keys = self._moments_of(query, key, key_padding_mask, scale)
        assert self.omega is not None, "softmax features always have omega"
        sharpened = self._sharpened(_finite(queries), _finite(keys))
        return ReparametrizedFeatures(self.omega, sharpened)

    @property
    def fingerprint(self) -> tuple[object, ...] | None:
        """That of the calibrated features."""
        return self._calibrated().fingerprint

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.query_side(x.dtype).log_linear(x).features()

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self.key_side(x.dtype).log_linear(x).features()

    def query_side(self, dtype: torch.dtype) -> LogLinearSide:
        return self._calibrated().query_side(dtype)

    def key_side(self, dtype: torch.dtype) -> LogLinearSide:
        return self._calibrated().key_side(dtype)

    def extra_repr(self) -> str:
        return (
            f"statistics={self.statistics!r}, num_heads={self.num_heads}, shift={self.shift}, "
            f"balance={self.balance}, optimal={self.optimal!r}, query_ratio={self.query_ratio}, "
            f"{super().extra_repr()}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ready": None}

    def _calibrated(self) -> ReparametrizedFeatures:
        """The features of the calibration. They are made again only when a buffer has changed: what
        they are computed from would cost a step of decoding more than attention does.
        """
        assert self.omega is not None, "softmax features always have omega"
        parts = (self.omega, *self._reparametrization())
        if torch.compiler.is_compiling() or any(part.is_inference() for part in parts):
            return ReparametrizedFeatures(self.omega, self._reparametrization())
        now = [(id(part), part._version) for part in parts]
        if self._ready is None or self._ready.versions != now:
            features = ReparametrizedFeatures(self.omega, self._reparametrization())
            self._ready = _Ready(features, now)
        return self._ready.features

    def _reparametrization(self) -> Reparametrization:
        return Reparametrization(
            self.query_shift, self.key_shift, self.query_map, self.key_map, self.exponent
        )

    def _learn(self, reparametrization: Reparametrization) -> None:
        pairs = zip(self._reparametrization(), reparametrization, strict=True)
        for buffer, part in pairs:
            buffer.copy_(part)

    def _moments(self, side: str) -> Moments:
        names = ("count", "mean", "covariance")
        return Moments(*(getattr(self, f"{side}_{name}") for name in names))

    def _moments_of(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, scale: float
    ) -> tuple[Moments, Moments]:
        """Moments of scaled queries and keys per sequence and key head, from a sample of positions.
        The queries that share a key head are one set. Keys are weighted by the attention that they
        receive.
        """
        check_attention_inputs(
            query,
            key,
            key,
            is_causal=False,
            key_padding_mask=key_padding_mask,
            enable_gqa=True,
            scale=scale,
        )
        check_feature_map(query, self.dim, self.num_redraws.device)
        group = query.shape[1] // key.shape[1]
        # With one query per key the mask of the keys is that of the queries, too. Else all queries
        # are real.
        query_mask = key_padding_mask if query.shape[2] == key.shape[2] else None
        rows, query_mask = sampled(query.detach(), query_mask)
        keys, key_mask = sampled(key.detach(), key_padding_mask)
        # [batch, key_heads, group · sample, dim]: all queries that meet a key head count as its
        # queries.
        rows = rows.unflatten(1, (key.shape[1], group)).flatten(2, 3)
        if query_mask is not None:
            query_mask = query_mask.repeat(1, group)
        wide, root = torch.promote_types(query.dtype, torch.float32), math.sqrt(scale)
        rows, keys = rows.to(wide), keys.to(wide)
        # Here `scale` goes into the scores. The moments get √scale on either side below.
        received = received_attention(rows, keys, query_mask, key_mask, scale)
        queries = Moments.of(rows, query_mask)
        return queries.scaled(root), Moments.of(keys, key_mask, received).scaled(root)

    def _sharpened(self, queries: Moments, keys: Moments) -> Reparametrization:
        return sharpen(
            queries,
            keys,
            shift=self.shift,
            balance=self.balance,
            optimal=self.optimal,
            query_ratio=self.query_ratio,
        )


def _finite(moments: Moments) -> Moments:
    """Moments with a count of 0 where they are not finite, so that φ stays plain there.

    NaN and infinity in the inputs then appear in the output of attention and nowhere else.
    """
    # The diagonal is enough: |Σ_ij| is at most the larger of Σ_ii and Σ_jj.
    ok = moments.covariance.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1)
    return Moments(
        moments.count * ok,
        moments.mean.where(ok[..., None], 0.0),
        moments.covariance.where(ok[..., None, None], 0.0),
    )
