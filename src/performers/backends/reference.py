"""The specification: linear attention written as its definition, one query position at a time.

A state absorbs keys and is read by queries. Both steps are softmaxes (DESIGN.md, Numerics): with
a_im = log φ_m(q_i) and b_jm = log φ_m(k_j),

    absorb:   s_m = max_j b_jm,    Z_m = Σ_j e^(b_jm − s_m),    S_m = Σ_j e^(b_jm − s_m) v_j
    read:     out_i = Σ_m w_im S_m / Σ_m w_im Z_m,    w_im = e^(a_im + s_m − c_i),
              c_i = max_m (a_im + s_m)

Every exponent is at most 0, and the largest of each sum is 0, so nothing overflows, nothing
vanishes, and no epsilon is needed. `s` and `c` are frames of reference that cancel; they are never
differentiated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.typing import FeatureMap, Features, LinearState, RecentKeys, exp_difference

__all__ = [
    "Partial",
    "absorb",
    "attend",
    "exact_partial",
    "key_exponent",
    "key_weights",
    "last_keys",
    "read",
    "read_weights",
    "with_recent",
]

# Signed features can have a normalizer of any sign. The paper's renormalizer adds 2ε to |D| ≤ ε.
SIGNED_STABILIZER = 1e-6


class Partial(NamedTuple):
    """What queries got from some of their keys, before D⁻¹: both sums times e^(−frame)."""

    numerator: Float[Tensor, "*batch query_length value_dim"]
    normalizer: Float[Tensor, "*batch query_length 1"]
    frame: Float[Tensor, "*batch query_length 1"]

    def merge(self, other: Partial) -> Partial:
        """What the queries get from both key sets."""
        frame = torch.maximum(self.frame, other.frame).detach()
        mine, theirs = exp_difference(self.frame, frame), exp_difference(other.frame, frame)
        return Partial(
            self.numerator * mine + other.numerator * theirs,
            self.normalizer * mine + other.normalizer * theirs,
            frame,
        )

    def output(
        self, normalize: bool, is_nonnegative: bool
    ) -> Float[Tensor, "*batch query_length value_dim"]:
        """Divide by the normalizer; a row that sees no key is 0.

        The normalizer of nonnegative features is 0 only there; that of signed features can vanish
        or change sign anywhere, and gets the paper's renormalizer.
        """
        if not normalize:
            return self.numerator * self.frame.exp()
        if is_nonnegative:
            return self.numerator / (self.normalizer + (self.normalizer == 0))
        nearly_zero = self.normalizer.abs() <= SIGNED_STABILIZER
        return self.numerator / (self.normalizer + 2 * SIGNED_STABILIZER * nearly_zero)


def attend(
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: FeatureMap,
    *,
    root: float,
    key_mask: Bool[Tensor, "batch key_length"] | None,
    is_causal: bool,
    normalize: bool,
    window_size: int | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention with φ(root · q) and φ(root · k), and the state after it.

    Query i sees the state and the keys j ≤ i, or all keys if not causal. Keys nearer than
    `window_size` are scored by exp(q·k) itself, the others by φ(q)·φ(k), under one normalizer.
    A Python step per query position, for clarity alone.
    """
    dtype = state.values.dtype
    recent = state.recent
    if recent is not None:
        key, value, key_mask = with_recent(recent, key, value, key_mask)
        recent = last_keys(key, value, key_mask, recent)
    query, key, value = query.to(dtype) * root, key.to(dtype) * root, value.to(dtype)
    features = phi.key_features(key)
    everywhere = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    visible = everywhere if key_mask is None else key_mask
    earlier_keys = key.shape[2] - query.shape[3] if is_causal else 0  # of the window's memory

    outputs = [query[..., :0, :1].expand(*query.shape[:3], 0, value.shape[-1])]
    for position in range(query.shape[3]):
        row = query[..., position, :]  # [batch, key_heads, group, dim]
        distance = position + earlier_keys - torch.arange(key.shape[2], device=key.device)
        seen = visible & (distance >= 0) if is_causal else visible
        near = distance.abs() < (window_size or 0)
        far = absorb(state, features, value, seen & ~near)
        partial = read(far, phi.query_features(row))
        if window_size is not None:
            mask = (seen & near)[:, None, None, :]
            partial = partial.merge(exact_partial(row, key, value, mask))
        outputs.append(partial.output(normalize, phi.is_nonnegative).unsqueeze(3))

    if recent is not None:
        visible = visible & (torch.arange(key.shape[2], device=key.device) < query.shape[3])
    return torch.cat(outputs, dim=3), replace(
        absorb(state, features, value, visible), recent=recent
    )


def absorb(
    state: LinearState,
    features: Features,
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
) -> LinearState:
    """The state that has seen these keys too; masked keys have no part in it."""
    if value.shape[2] == 0:
        return state
    exponent = key_exponent(features, key_mask)
    state = state.rescaled(torch.maximum(state.log_scale, exponent.detach().amax(dim=2)))
    weights = key_weights(exponent, state.log_scale.unsqueeze(2), features)
    return replace(
        state,
        normalizer=state.normalizer + weights.sum(dim=2),
        values=state.values + weights.mT @ value,
    )


def read(state: LinearState, features: Features) -> Partial:
    """What queries find in the state."""
    weights, frame = read_weights(state.log_scale.unsqueeze(2), features)
    return Partial(weights @ state.values, weights @ state.normalizer.unsqueeze(-1), frame)


def read_weights(
    log_scale: Float[Tensor, "batch key_heads 1 num_features"], features: Features
) -> tuple[
    Float[Tensor, "batch key_heads query_length num_features"],
    Float[Tensor, "batch key_heads query_length 1"],
]:
    """w_im = φ_m(q_i) e^(s_m − c_i), the weight of each feature for each query, and c_i.

    The factor of a whole row goes to the frame, untouched by rounding with ω·q.
    """
    exponent = log_scale
    if features.log_values is not None:
        exponent = exponent + features.log_values
    frame = exponent.detach().amax(dim=-1, keepdim=True)
    weights = exp_difference(exponent, frame)
    if features.values is not None:
        weights = weights * features.values
    frame = frame.expand(*weights.shape[:-1], 1)
    return weights, frame if features.log_rows is None else frame + features.log_rows


def key_weights(
    exponent: Float[Tensor, "batch key_heads key_length width"],
    frame: Float[Tensor, "batch key_heads 1 num_features"],
    features: Features,
) -> Float[Tensor, "batch key_heads key_length num_features"]:
    """φ_m(k_j) e^(−s_m).

    Features that share one exponent (width 1) have grown one frame: of it, a single column is
    needed, which spares ReLU features the exponentials.
    """
    weights = exp_difference(exponent, frame[..., : exponent.shape[-1]])
    return weights if features.values is None else weights * features.values


def exact_partial(
    query: Float[Tensor, "*batch query_length dim"],
    key: Float[Tensor, "*batch key_length dim"],
    value: Float[Tensor, "*batch key_length value_dim"],
    mask: Bool[Tensor, "*#batch #query_length key_length"],
) -> Partial:
    """What queries get by exp(q·k) itself from the keys that the mask shows them."""
    scores = (query @ key.mT).masked_fill(~mask, -torch.inf)
    frame = scores.detach().amax(dim=-1, keepdim=True)
    weights = exp_difference(scores, frame)
    return Partial(weights @ value, weights.sum(dim=-1, keepdim=True), frame)


def key_exponent(
    features: Features, key_mask: Bool[Tensor, "batch key_length"] | None
) -> Float[Tensor, "batch key_heads key_length width"]:
    """b_jm, −∞ for masked keys."""
    exponent = features.exponent()
    if key_mask is None:
        return exponent
    return exponent.masked_fill(~key_mask[:, None, :, None], -torch.inf)


def with_recent(
    recent: RecentKeys,
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
) -> tuple[
    Float[Tensor, "batch key_heads longer dim"],
    Float[Tensor, "batch key_heads longer value_dim"],
    Bool[Tensor, "batch longer"],
]:
    """The keys and values that a window remembers, followed by the new ones."""
    if key_mask is None:
        key_mask = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    return (
        torch.cat([recent.key.to(key.dtype), key], dim=2),
        torch.cat([recent.value.to(value.dtype), value], dim=2),
        torch.cat([recent.visible, key_mask], dim=1),
    )


def last_keys(
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"],
    window: RecentKeys,
) -> RecentKeys:
    """What a window like the given one remembers after these keys, and no memory of the others."""
    start = key.shape[2] - window.key.shape[2]
    return RecentKeys(key[:, :, start:], value[:, :, start:], key_mask[:, start:]).map(Tensor.clone)
