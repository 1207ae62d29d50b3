"""The specification: linear attention written as its definition, one query position at a time.

A state absorbs keys and is read by queries. Both steps are softmaxes (DESIGN.md, Numerics): with
a_im = log φ_m(q_i) and b_jm = log φ_m(k_j),

    absorb:   s_m = max_j b_jm,    Z_m = Σ_j e^(b_jm − s_m),    S_m = Σ_j e^(b_jm − s_m) v_j
    read:     out_i = Σ_m w_im S_m / Σ_m w_im Z_m,    w_im = e^(a_im + s_m − c_i),
              c_i = max_m (a_im + s_m)

Every exponent is at most 0, and the largest of each sum is 0, so nothing overflows, no normalizer
vanishes, and no epsilon is needed. `s` and `c` are *frames*: running maxima, as in an online
softmax, relative to which the sums are kept. They cancel in the output, so they are never
differentiated.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.call import Call
from performers.backends.heavy import HeavyKeys, heavy_keys
from performers.backends.slots import Slots
from performers.state import LinearState, NearField, NearKeys, exp_difference
from performers.typing import Features

__all__ = [
    "Partial",
    "absorb",
    "attend",
    "exact_partial",
    "key_exponent",
    "key_weights",
    "read",
    "read_weights",
    "remembered",
    "renormalized",
]


class Partial(NamedTuple):
    """What queries get from some of their keys, before D⁻¹: both sums, times e^(−frame)."""

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

    def limited(self, near: Partial, limit: float) -> tuple[Partial, Tensor]:
        """What the queries get at most from these keys where `near` is what they get from others,
        and the log of the factor that this takes.

        The sum of weights is at most `limit` times that of `near`; a query that sees nothing near
        has no limit.
        """
        is_free = (near.normalizer == 0) | (self.normalizer == 0)
        sums = (x.normalizer.masked_fill(is_free, 1.0).log() + x.frame for x in (near, self))
        log_near, log_sum = sums
        log_factor = (log_near + math.log(limit) - log_sum).clamp(max=0).masked_fill(is_free, 0.0)
        # Into the frame, lest a small factor meet sums that are large in a frame that is small.
        frame = self.frame + log_factor.detach()
        rest = (log_factor - log_factor.detach()).exp()  # 1, with the gradient
        return Partial(self.numerator * rest, self.normalizer * rest, frame), log_factor

    def output(self, call: Call) -> Float[Tensor, "*batch query_length value_dim"]:
        """Divide by the normalizer; a row that sees no key is 0.

        The normalizer of nonnegative features is 0 for such a row only. That of signed features can
        vanish or change sign for any row, so the paper's renormalizer is added to it.
        """
        if not call.normalize:
            return self.numerator * self.frame.exp()
        if call.phi.is_nonnegative:
            # 0 / 1 instead of 0 / 0 for a row that sees no key.
            return self.numerator / (self.normalizer + (self.normalizer == 0))
        return self.numerator / renormalized(self.normalizer)


def renormalized(normalizer: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """D + 2ε where |D| ≤ ε, the paper's renormalizer: where features can be negative, so can D."""
    # Literals, because dynamic compilation makes inputs of floats that it reads, and loses them
    # between recomputed tiles.
    return normalizer + 2e-6 * (normalizer.abs() <= 1e-6)


def attend(
    call: Call,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention with φ(root · q) and φ(root · k), and the state after it.

    Query i sees the state and the keys j ≤ i, or all keys if not causal. Those in the near field
    are scored by exp(q·k) itself, the others by φ(q)·φ(k), under one normalizer. There is a Python
    step for each query position, for the sake of clarity.
    """
    if call.near is not None:
        return _attend_near(call, call.near, query, key, value, key_mask, state)
    query, value = call.scaled(query), value.to(call.dtype)
    features = call.phi.key_features(call.scaled(key))
    everywhere = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    visible = everywhere if key_mask is None else key_mask
    place = torch.arange(key.shape[2], device=key.device)
    outputs = [_no_rows(query, value)]
    for position in range(query.shape[3]):
        seen = visible & (place <= position) if call.is_causal else visible
        far = absorb(state, features, value, seen)
        partial = read(far, call.phi.query_features(query[..., position, :]))
        outputs.append(partial.output(call).unsqueeze(3))
    return torch.cat(outputs, dim=3), absorb(state, features, value, visible)


def _attend_near(
    call: Call,
    near: NearField,
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_mask: Bool[Tensor, "batch length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group length value_dim"], LinearState]:
    """`attend` with a near field, in the order of slots."""
    slots = Slots.of(near, query, key, value, key_mask, state.near)
    sink_key, sink_value, is_sink = slots.sinks(state.near)
    query, value = call.scaled(slots.query), slots.value.to(call.dtype)
    key, sink_key = call.scaled(slots.key), call.scaled(sink_key)
    heavy = heavy_keys(call, slots, state.near)
    heavy_key, heavy_value = call.scaled(heavy.of_blocks.key), heavy.of_blocks.value.to(call.dtype)
    features = call.phi.key_features(key)
    exact_keys = torch.cat([sink_key, key], dim=2)
    exact_values = torch.cat([sink_value.to(call.dtype), value], dim=2)
    positions, sink_positions = slots.positions(), torch.arange(near.num_sinks, device=key.device)
    block = positions // near.window_size
    estimated = slots.estimated()
    estimated = torch.ones_like(positions, dtype=torch.bool) if estimated is None else estimated
    outputs = [_no_rows(query, value)]
    for slot in range(query.shape[3]):
        position, row = positions[:, slot, None], query[..., slot, :]
        seen, seen_sinks = estimated, is_sink
        if call.is_causal:
            seen = seen & (positions <= position)
            seen_sinks = seen_sinks & (sink_positions <= position)
        # Block numbers of the keys, and that of the query: its own block and both neighbors.
        is_near = (block - position // near.window_size).abs() <= 1
        # The sinks come first, as in `exact_keys`. `estimated` leaves them out, so none is counted
        # twice.
        mask = torch.cat([seen_sinks, seen & is_near], dim=1)[:, None, None, :]
        partial = exact_partial(row, exact_keys, exact_values, mask)
        if near.num_heavy:
            number = slot // near.window_size
            of_key, of_value = heavy_key[:, :, number], heavy_value[:, :, number]
            is_there = heavy.of_blocks.weight[:, :, number, None] > -torch.inf
            partial = partial.merge(exact_partial(row, of_key, of_value, is_there))
        if near.far:
            far = absorb(state, features, value, seen & ~is_near)
            estimated_far = read(far, call.phi.query_features(row))
            if call.far_limit is not None:
                estimated_far, _ = estimated_far.limited(partial, call.far_limit)
            partial = partial.merge(estimated_far)
        outputs.append(partial.output(call).unsqueeze(3))
    out = slots.tokens(torch.cat(outputs, dim=3))
    if not call.has_state:
        return out, state
    if near.far:
        state = absorb(state, features, value, estimated & (positions < slots.next_start()))
    return out, replace(state, near=remembered(slots, state, heavy))


def remembered(slots: Slots, state: LinearState, heavy: HeavyKeys) -> NearKeys:
    """What a state keeps for the tokens that come after these slots, besides its sums."""
    near, start = slots.near, slots.next_start()
    position = start + torch.arange(2 * near.window_size, device=start.device)
    key, value = slots.at(position)
    sink_key, sink_value, _ = slots.sinks(state.near)
    count = slots.count.squeeze(1)
    return NearKeys(key, value, sink_key, sink_value, *heavy.later, heavy.sums, count)


def _no_rows(
    query: Float[Tensor, "*batch length dim"], value: Tensor
) -> Float[Tensor, "*batch 0 value_dim"]:
    """An output without rows, connected to the inputs so that a backward pass can start from it."""
    return query[..., :0, :1].expand(*query.shape[:-2], 0, value.shape[-1])


def absorb(
    state: LinearState,
    features: Features,
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
) -> LinearState:
    """The state after these keys, without the masked ones."""
    if value.shape[2] == 0:
        return state
    exponent = key_exponent(features, key_mask)
    # The online softmax: bring the sums to the larger frame, then add terms that are at most 1.
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

    A factor common to a whole row goes into the frame, so that adding it to ω·q does not round it.
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

    Features that share one exponent (width 1) have equal frames, so a single column of frames is
    enough, and features such as ReLU need no exponentials.
    """
    weights = exp_difference(exponent, frame[..., : exponent.shape[-1]])
    return weights if features.values is None else weights * features.values


def exact_partial(
    query: Float[Tensor, "*batch query_length dim"],
    key: Float[Tensor, "*batch key_length dim"],
    value: Float[Tensor, "*batch key_length value_dim"],
    mask: Bool[Tensor, "*#batch #query_length key_length"],
) -> Partial:
    """What queries get by exp(q·k) itself from the keys that the mask shows."""
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
