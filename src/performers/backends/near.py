"""Attention with a near field: all new tokens at once by an operator, the next one by a step.

What is far needs positive features of the softmax kernel, whose sides the operator is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks import BlockAttention, Problem, block_attention
from performers.backends.call import Call
from performers.backends.derivatives import is_traced
from performers.backends.fused_softmax import HIDDEN
from performers.backends.heavy import Kept, heavy_keys
from performers.backends.reference import absorb, remembered
from performers.backends.slots import Slots
from performers.state import LinearState, NearField, NearKeys
from performers.typing import FeatureMap, LogLinearSide, is_log_linear

__all__ = ["attend"]


def attend(
    call: Call,
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_mask: Bool[Tensor, "batch length"] | None,
    state: LinearState,
    operator: Callable[[Problem], BlockAttention] = block_attention,
) -> tuple[Float[Tensor, "batch key_heads group length value_dim"], LinearState]:
    """What `reference.attend` computes with a near field, up to rounding.

    `operator` does the work on slots.
    """
    near, is_causal, dtype = call.near, call.is_causal, call.dtype
    assert near is not None, "backends come here with a near field only"
    if state.near is not None and query.shape[3] == 1:
        return _step(call, near, state.near, query, key, value, key_mask, state)
    slots = Slots.of(near, query, key, value, key_mask, state.near)
    batch, heads = key.shape[:2]
    sink_key, sink_value, is_sink = slots.sinks(state.near)
    sink_start = torch.arange(near.num_sinks, device=key.device) - slots.start
    sink_start = sink_start if is_causal else torch.zeros_like(sink_start)
    sink_start = torch.where(is_sink, sink_start, slots.key.shape[2])
    estimated = slots.estimated()
    hidden = hidden_far = None if estimated is None else ~estimated
    if call.has_state:  # whose sums leave out what is near of the tokens to come
        later = slots.positions() >= slots.next_start()
        hidden_far = later if hidden is None else later | hidden
    heavy = heavy_keys(call, slots, state.near)
    sides = _Sides.of(call.phi, dtype) if near.far else _Sides.of_nothing(key, dtype)
    log_mass, average = sides.averages(state)
    found = operator(
        Problem(
            slots.query.flatten(0, 1),
            slots.key.flatten(0, 1),
            slots.value.flatten(0, 1),
            None if hidden is None else hidden.repeat_interleave(heads, 0),
            None if hidden_far is None else hidden_far.repeat_interleave(heads, 0),
            sink_key.flatten(0, 1),
            sink_value.flatten(0, 1),
            sink_start.repeat_interleave(heads, 0),
            heavy.of_blocks.key.flatten(0, 1),
            heavy.of_blocks.value.flatten(0, 1),
            (heavy.of_blocks.weight == -torch.inf).flatten(0, 1),
            **sides.arguments(batch, heads),
            log_mass=log_mass,
            average=average,
            window_size=near.window_size,
            scale=call.scale,
            is_causal=is_causal,
            far_limit=call.far_limit,
        )
    )
    out = found.out if call.normalize else found.out * found.log_sum.exp()
    out = slots.tokens(out.unflatten(0, (batch, heads)))
    if not call.has_state:
        return out, state
    after = sides.sums(found.log_mass, found.average, state)
    return out, replace(after, near=remembered(slots, state, heavy))


class _Sides(NamedTuple):
    """φ of queries and of keys. `key_numbers`: what each feature of every key has."""

    query: LogLinearSide
    key: LogLinearSide
    key_numbers: Float[Tensor, "*heads num_features"]

    @classmethod
    def of(cls, phi: FeatureMap, dtype: torch.dtype) -> _Sides:
        assert is_log_linear(phi), "`check_near_field` lets no other features in"
        query, key = phi.query_side(dtype), phi.key_side(dtype)
        return cls(query, key, _numbers(key))

    @classmethod
    def of_nothing(cls, like: Tensor, dtype: torch.dtype) -> _Sides:
        """No features, for a near field alone."""
        side = LogLinearSide(like.new_zeros(0, like.shape[-1], dtype=dtype), 0.0)
        return cls(side, side, _numbers(side))

    def arguments(self, batch: int, heads: int) -> dict[str, Any]:
        """The sides as `Problem` has them, one row for all heads or one for each."""

        def rows(x: Tensor | None) -> Tensor | None:
            if x is None or x.ndim == 2:
                return None if x is None else x.unsqueeze(0)
            return x.expand(batch, heads, *x.shape[-2:]).flatten(0, 1)

        numbers = _numbers(self.query) + self.key_numbers
        return {"tilt": rows(numbers.unsqueeze(-2))} | {
            f"{name}_{part}": rows(getattr(side, part))
            for name, side in (("query", self.query), ("key", self.key))
            for part in ("directions", "shift", "matrix", "linear", "lengths", "surplus")
        }

    def averages(self, state: LinearState) -> tuple[Tensor, Tensor]:
        """The log of a state's sums of features, less `key_numbers`, and its averages of values."""
        is_empty = state.normalizer == 0
        total = state.normalizer.masked_fill(is_empty, 1.0)
        log_mass = state.log_scale.masked_fill(is_empty, 0.0) + total.log() - self.key_numbers
        log_mass = log_mass.masked_fill(is_empty, HIDDEN)
        return log_mass.flatten(0, 1), (state.values / total.unsqueeze(-1)).flatten(0, 1)

    def sums(self, log_mass: Tensor, average: Tensor, like: LinearState) -> LinearState:
        """The way back: the state with these averages."""
        log_mass, average = log_mass.view_as(like.normalizer), average.view_as(like.values)
        is_empty = log_mass <= HIDDEN / 2
        log_mass = log_mass + self.key_numbers
        log_scale = log_mass.detach()
        total = (log_mass - log_scale).exp().masked_fill(is_empty, 0.0)
        log_scale = log_scale.masked_fill(is_empty, -torch.inf)
        return replace(
            like, log_scale=log_scale, normalizer=total, values=average * total.unsqueeze(-1)
        )


def _numbers(side: LogLinearSide) -> Float[Tensor, "*heads num_features"]:
    """What log φ_m has besides y·ω_m and the numbers of a row."""
    tilt = side.directions.new_zeros(side.directions.shape[:-1]) if side.tilt is None else side.tilt
    return tilt + (side.constant if isinstance(side.constant, float) else side.constant.squeeze(-1))


def _step(
    call: Call,
    near: NearField,
    earlier: NearKeys,
    query: Float[Tensor, "batch key_heads group 1 dim"],
    key: Float[Tensor, "batch key_heads 1 dim"],
    value: Float[Tensor, "batch key_heads 1 value_dim"],
    key_mask: Bool[Tensor, "batch 1"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group 1 value_dim"], LinearState]:
    """One token after those of the state, at a cost that does not depend on how many there are.

    The last token of a block adds the block before to the sums, which is far of all later tokens.
    """
    size, dtype = near.window_size, call.dtype
    count = earlier.count[:, None, None, None]
    offset = count % size  # of the token in its block, whose first slot is `size`
    # Padding is 0, and writes what was there.
    keys, values = (
        x.scatter(2, (offset + size).expand_as(new), new.to(x.dtype))
        for x, new in ((earlier.key, key), (earlier.value, value))
    )
    slot = torch.arange(2 * size, device=key.device) - size - offset  # before the token
    visible = (slot <= 0) & (slot >= near.num_sinks - count)
    row = call.scaled(query.squeeze(3))
    wide_keys, wide_values = keys.to(dtype), values.to(dtype)
    exact_row = row * call.root  # times keys that are not scaled
    logits = exact_row @ wide_keys.mT
    parts = [(logits.masked_fill(~visible, -torch.inf), wide_values)]
    sink_key, sink_value = earlier.sink_key, earlier.sink_value
    if near.num_sinks:
        sink = torch.arange(near.num_sinks, device=key.device)
        is_own = sink[:, None] == count
        if key_mask is not None:
            is_own = is_own & key_mask[:, None, None]
        sink_key = torch.where(is_own, key.to(sink_key.dtype), sink_key)
        sink_value = torch.where(is_own, value.to(sink_value.dtype), sink_value)
        logits = exact_row @ sink_key.to(dtype).mT
        parts.append((logits.masked_fill(sink > count, -torch.inf), sink_value.to(dtype)))
    if near.num_heavy:
        logits = exact_row @ earlier.heavy_key.to(dtype).mT
        absent = earlier.heavy_weight.unsqueeze(2) == -torch.inf
        parts.append((logits.masked_fill(absent, -torch.inf), earlier.heavy_value.to(dtype)))
    if near.far:
        exponent = call.phi.query_features(row).exponent() + state.log_scale.unsqueeze(2)
        if call.far_limit is not None:
            room = torch.cat([part for part, _ in parts], dim=-1).logsumexp(dim=-1, keepdim=True)
            is_empty = state.normalizer == 0
            total = state.normalizer.masked_fill(is_empty, 1.0)
            masses = exponent.masked_fill(is_empty.unsqueeze(2), HIDDEN) + total.log().unsqueeze(2)
            room = room + math.log(call.far_limit) - masses.logsumexp(dim=-1, keepdim=True)
            exponent = exponent + room.clamp(max=0)
        parts.append((exponent, state.values))

    # One softmax over near keys and features; the token sees itself, so it is never over nothing.
    logits = torch.cat([part for part, _ in parts], dim=-1)
    frame = logits.detach().amax(dim=-1, keepdim=True)
    weights = (logits - frame).exp()
    first, *others = weights.split([part.shape[-1] for part, _ in parts], dim=-1)
    num_exact = 2 * size + near.num_sinks + near.num_heavy
    normalizer = weights[..., :num_exact].sum(dim=-1, keepdim=True)
    if near.far:
        normalizer = normalizer + others[-1] @ state.normalizer.unsqueeze(-1)
    numerator = first @ wide_values
    for weight, (_, part_values) in zip(others, parts[1:], strict=True):
        numerator = numerator + weight @ part_values
    out = numerator / normalizer if call.normalize else numerator * frame.exp()
    out = out.unsqueeze(3)

    is_full = offset == size - 1
    if key_mask is not None:
        out = out.masked_fill(~key_mask[:, None, None, :, None], 0.0)
        is_full = is_full & key_mask[:, None, None]
    heavy, sums = Kept.of(earlier), earlier.heavy_sums
    if near.num_heavy:
        paid = logits[..., : 2 * size + near.num_sinks].detach().softmax(dim=-1)
        paid = paid[..., : 2 * size].sum(dim=2)
        sums = sums + (paid if key_mask is None else paid * key_mask[:, None])
    if is_traced() or bool(is_full.any()):
        full = is_full.squeeze(3)
        before, of_before = keys[:, :, :size], values[:, :, :size]
        is_known = (count + slot)[:, :, 0, :size] >= near.num_sinks  # and no sink
        if near.far:
            features = call.phi.key_features(call.scaled(before))
            state = absorb(state, features, of_before.to(dtype), (is_known & full).squeeze(1))
        if near.num_heavy:
            heavier = heavy.with_block(before, of_before, sums, is_known)
            heavy = heavy.where(full, heavier)
            sums = torch.where(full, F.pad(sums[..., size:], (0, size)), sums)
        keys, values = (
            torch.where(is_full, F.pad(x[:, :, size:], (0, 0, 0, size)), x) for x in (keys, values)
        )
    count = earlier.count + (1 if key_mask is None else key_mask.squeeze(1))
    after = NearKeys(keys, values, sink_key, sink_value, *heavy, sums, count)
    return out, replace(state, near=after)
