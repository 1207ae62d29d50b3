"""Attention of one layer with an exact near field and one of several far fields, in plain PyTorch.

The near field is that of `favor_attention`: blocks of keys, and a few sinks. A far field gives each
query two numbers of its far keys, which the normalizer needs: the log of their mass, Σ exp(q·k),
and the average of their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from performers import draw_projection
from performers.functional.moments import Moments, received_attention
from performers.functional.sharp import ReparametrizedFeatures, sharpen
from performers.theory.cost import favor_operations

NUM_SINKS = 4
# Far pairs are learned from the attention that this many queries pay.
SAMPLED_QUERIES = 96
# Instead of −∞, so that an empty sum has an average too: 0.
LEAST = -1e30
# The near field alone, among the rows of `FAR_FIELDS`.
NOTHING = "nothing"


@dataclass(frozen=True)
class Setting:
    """Exact keys in blocks of `window` and 4 sinks, and what stands for the others.

    `far`: a row of `FAR_FIELDS`. `size`: its number of features, or of keys that it keeps.
    `cap`: each query's far mass is at most this share of its near mass.
    """

    window: int
    far: str = NOTHING
    size: int = 0
    cap: float | None = None


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    layer: Layer,
    setting: Setting,
    seed: int,
) -> Tensor:
    """The near and the far field of a setting under one normalizer."""
    blocks = Blocks(query, key, value, scale, setting.window, is_causal)
    near_mass, out = blocks.near()
    if setting.far != NOTHING:
        far_mass, far = FAR_FIELDS[setting.far].estimate(blocks, layer, setting, seed)
        if setting.cap is not None:
            far_mass = far_mass.minimum(near_mass + math.log(setting.cap))
        out = out + torch.sigmoid(far_mass - near_mass) * (far - out)
    return blocks.join(out)


def attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the sum of exp(scores), and the average of values by it, for each query."""
    mass = scores.logsumexp(-1, keepdim=True)
    return mass, (scores - mass.clamp_min(LEAST)).exp() @ values


class Blocks:
    """One layer's queries, keys and values for one sequence, cut into blocks.

    Tensors are (key heads, queries per key head or 1, blocks, window, dim), so that they broadcast.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, is_causal: bool
    ) -> None:
        self.window, self.is_causal, self.length = window, is_causal, key.shape[1]
        # Both sides get half of the scale, as for features.
        self.rows = (query * scale**0.5).unflatten(0, (len(key), -1))
        self.columns = (key * scale**0.5)[:, None]
        self.query, self.key = self.cut(self.rows), self.cut(self.columns)
        self.value = self.cut(value[:, None])
        number = torch.arange(self.query.shape[2])
        self.position = number[:, None] * window + torch.arange(window)
        behind = number[:, None] - number
        self.is_far = behind >= 2 if is_causal else behind.abs() >= 2  # [blocks, blocks of keys]
        # What a far field may hold: real tokens that are not sinks.
        self.may_be_far = (self.position >= NUM_SINKS) & (self.position < self.length)
        # The keys that a block sees: sinks, the block before, its own, and the one after.
        near = torch.arange(-window, window * (1 if is_causal else 2))
        sinks = torch.arange(NUM_SINKS).expand(len(number), -1)
        self.seen = torch.cat([sinks, self.position[:, :1] + near], dim=1)

    def cut(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.window)).unflatten(2, (-1, self.window))

    def join(self, x: Tensor) -> Tensor:
        """(heads, length, dim) of (key heads, queries per key head, blocks, window, dim)."""
        return x.flatten(0, 1).flatten(1, 2)[:, : self.length]

    def chosen(self, x: Tensor, position: Tensor) -> Tensor:
        """(key heads, 1, blocks, keys, dim): keys or values at these positions, for each block."""
        flat = x.flatten(2, 3)[:, 0]
        index = position.clamp(0, flat.shape[1] - 1).expand(len(flat), -1, -1)
        rows = flat[:, None].expand(-1, index.shape[1], -1, -1)
        return rows.take_along_dim(index[..., None], dim=2)[:, None]

    @cached_property
    def is_seen(self) -> Tensor:
        """Which of the keys in `seen` a query sees, each once: (blocks, window, keys)."""
        is_real = (self.seen >= 0) & (self.seen < self.length)
        is_real[:, NUM_SINKS:] &= self.seen[:, NUM_SINKS:] >= NUM_SINKS
        is_seen = is_real[:, None].expand(-1, self.window, -1)
        if self.is_causal:
            is_seen = is_seen & (self.seen[:, None] <= self.position[..., None])
        return is_seen

    @cached_property
    def near_scores(self) -> Tensor:
        scores = self.query @ self.chosen(self.key, self.seen).mT
        return scores.masked_fill(~self.is_seen, -math.inf)

    def near(self) -> tuple[Tensor, Tensor]:
        return attend(self.near_scores, self.chosen(self.value, self.seen))

    def far_mean(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Over the far keys of each block the mean of x yᵀ, or of x: (key heads, 1, blocks, dim,
        dim of y or 1).
        """
        may_be_far, is_far = self.may_be_far[..., None].to(x.dtype), self.is_far.to(x.dtype)
        of_blocks = (x * may_be_far).mT @ (torch.ones_like(x[..., :1]) if y is None else y)
        return torch.einsum("qk,hgkde->hgqde", is_far, of_blocks) / self.far_count.clamp_min(1)

    @cached_property
    def far_count(self) -> Tensor:
        return (self.is_far.float() @ self.may_be_far.sum(dim=1).float())[:, None, None]


class Layer:
    """What one layer has learned on calibration text: moments of queries and keys."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.moments: dict[str, tuple[Moments, Moments]] = {}
        self.maps: dict[tuple[Any, ...], ReparametrizedFeatures] = {}

    def learn(self, blocks: Blocks) -> None:
        """From all pairs, as `calibrate` does, and from far pairs: queries that have far keys, and
        each key by the attention that these pay it from afar.
        """
        rows, columns, length = blocks.rows, blocks.columns, blocks.length
        may_be_far = (torch.arange(length) >= NUM_SINKS)[None]
        received = received_attention(
            rows.flatten(1, 2)[None], columns.movedim(1, 0), key_mask=may_be_far
        )
        self._merge("all pairs", blocks, rows, may_be_far, received)
        first = 2 * blocks.window if blocks.is_causal else 0
        chosen = torch.linspace(first, length - 1, SAMPLED_QUERIES).long()
        block_of = torch.arange(length) // blocks.window
        is_far = blocks.is_far[block_of[chosen]][:, block_of] & may_be_far
        scores = rows[:, :, chosen] @ columns.mT
        if blocks.is_causal:
            scores = scores.masked_fill(torch.arange(length) > chosen[:, None], -math.inf)
        received = (scores.softmax(-1) * is_far).sum((1, 2))[None]
        self._merge("far pairs", blocks, rows[:, :, chosen], may_be_far, received)

    def _merge(
        self, pairs: str, blocks: Blocks, rows: Tensor, may_be_far: Tensor, received: Tensor
    ) -> None:
        queries = Moments.of(rows.flatten(1, 2)[None].double()).over_batch()
        keys = Moments.of(blocks.columns.movedim(1, 0).double(), may_be_far, received).over_batch()
        if pairs in self.moments:
            old_queries, old_keys = self.moments[pairs]
            queries, keys = old_queries.merge(queries), old_keys.merge(keys)
        self.moments[pairs] = queries, keys

    def features(self, setting: Setting, seed: int) -> ReparametrizedFeatures:
        name = (setting.far, setting.size, seed)
        if name not in self.maps:
            queries, keys = self.moments[setting.far]
            generator = torch.Generator().manual_seed(1000 * seed + self.number)
            omega = draw_projection(setting.size, queries.mean.shape[-1], generator=generator)
            self.maps[name] = ReparametrizedFeatures(omega, sharpen(queries, keys))
        return self.maps[name]


def _features(blocks: Blocks, layer: Layer, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """Sharp features."""
    phi = layer.features(setting, seed)
    rows = phi.query_features(blocks.rows.flatten(1, 2)[None]).exponent()[0]
    columns = phi.key_features(blocks.columns.movedim(1, 0)).exponent()
    query = blocks.cut(rows.unflatten(1, (-1, blocks.length)))
    key = blocks.cut(columns.movedim(0, 1)).masked_fill(~blocks.may_be_far[..., None], -math.inf)
    # Of each feature: the log of its sum over a block of keys, and their values' average by it.
    block_sums, averages = attend(key.mT, blocks.value)
    # [key heads, 1, blocks, blocks of keys, features]
    shares = block_sums[:, :, None, ..., 0].masked_fill(~blocks.is_far[..., None], -math.inf)
    sums = shares.logsumexp(3, keepdim=True)
    shares = (shares - sums.clamp_min(LEAST)).exp()
    values = torch.einsum("hgqkm,hgkmd->hgqmd", shares, averages)
    return attend(query + sums, values)


def _averaged(blocks: Blocks, layer: Layer, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """One key and one value, their means, which count as often as there are far keys."""
    mass = blocks.far_count.log() + blocks.query @ blocks.far_mean(blocks.key)
    return mass, blocks.far_mean(blocks.value).mT


def _normal(blocks: Blocks, layer: Layer, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """As if keys were normal, and values linear in keys:

    Σ exp(q·k) ≈ n exp(q·E[k] + qᵀ Cov(k) q / 2),    average of values ≈ E[v] + Cov(v, k) q
    """
    mass, average = _averaged(blocks, layer, setting, seed)
    key = blocks.far_mean(blocks.key)
    of_keys = blocks.far_mean(blocks.key, blocks.key) - key * key.mT
    with_values = blocks.far_mean(blocks.key, blocks.value) - key * average
    spread = (blocks.query @ of_keys * blocks.query).sum(-1, keepdim=True)
    return mass + spread / 2, average + blocks.query @ with_values


def _kept(blocks: Blocks, layer: Layer, setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """The far keys that received the most attention per query while they were near, exactly.

    The best of the blocks before can be kept up from block to block, and so can those after.
    """
    is_real = (blocks.position < blocks.length)[..., None]
    is_seen = (blocks.is_seen & is_real).float()
    received = blocks.near_scores.softmax(-1).mul(is_seen).sum((1, 3))
    place = blocks.seen.clamp(0, blocks.position.numel() - 1).flatten()
    weight, number = (
        x.new_zeros(len(x), blocks.position.numel()).index_add(1, place, x.flatten(1))
        for x in (received, is_seen.sum(1)[None])
    )
    weight = (weight / number.clamp_min(1)).masked_fill(~blocks.may_be_far.flatten(), -math.inf)
    is_far = blocks.is_far.repeat_interleave(blocks.window, dim=1)
    weight = weight[:, None].masked_fill(~is_far, -math.inf)
    best = weight.topk(min(setting.size, weight.shape[-1]), dim=-1)
    scores = blocks.query @ blocks.chosen(blocks.key, best.indices).mT
    scores = scores.masked_fill((best.values == -math.inf)[:, None, :, None], -math.inf)
    return attend(scores, blocks.chosen(blocks.value, best.indices))


@dataclass(frozen=True)
class FarField:
    """`estimate`: for each query the log of the far mass, and the average of the far values.

    `operations`: of a token and head, from the length, the dim and the setting.
    """

    title: str
    estimate: Callable[[Blocks, Layer, Setting, int], tuple[Tensor, Tensor]]
    operations: Callable[[int, int, Setting, bool], float]


def _feature_operations(length: int, dim: int, setting: Setting, is_causal: bool) -> float:
    near = (setting.window, NUM_SINKS, is_causal)
    return (
        favor_operations(length, dim, setting.size, *near, is_sharp=True)
        - favor_operations(length, dim, 0, *near)
    ) / length


FAR_FIELDS = {
    "all pairs": FarField("sharp, m = {}", _features, _feature_operations),
    "far pairs": FarField("sharp by far pairs, m = {}", _features, _feature_operations),
    "averaged": FarField("average", _averaged, lambda length, dim, setting, is_causal: 4 * dim),
    "normal": FarField("normal", _normal, lambda length, dim, setting, is_causal: 8 * dim**2),
    "kept": FarField(
        "{} keys kept", _kept, lambda length, dim, setting, is_causal: 4 * dim * setting.size
    ),
}
