"""The causal scan over exponential features, forward and backward by hand, as one operator.

Where log φ_m(x) = x·ω_m + (a number of the row), a chunk of C positions takes few matrix products:

    B = K Ω_kᵀ + rows     K′ = e^(B − s)      s: a frame per feature, from the past
    A = Q Ω_qᵀ + s        Q′ = e^(A − c)      c: a frame per row
    out ← tril(Q′K′ᵀ) [V 1] + Q′ S            both sums at once
    S   ← S + K′ᵀ [V 1]

A *frame* is the exponent that is subtracted before exp is taken, such as the running maximum of an
online softmax. It must not depend on later keys (see `_passes`), and it cancels in the output.

The backward pass computes Q′ and K′ again, chunk by chunk from the end, from states kept once per
segment of about m positions: a state has m (d + 1) numbers, so they cost as much as V, at any m.

Registered with torch.library, so `torch.compile(fullgraph=True)` sees one operator, although the
number of passes over a chunk depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends import plain
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients
from performers.backends.reference import Partial
from performers.backends.tiles import MAX_RISE, exponent_at, rows_below
from performers.state import LinearState, exp_difference
from performers.typing import Features, LogLinear

__all__ = ["scan"]

CHUNK = 64


def scan(
    queries: LogLinear,
    keys: LogLinear,
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_mask: Bool[Tensor, "batch length"] | None,
    state: LinearState,
) -> tuple[Partial, LinearState]:
    """What each query gets from the state and the keys up to its own, and the state after them.

    Rows of `queries` are [group · length]; those of the result [group, length].
    """
    batch, heads, length = value.shape[:3]
    log_rows = keys.shared_exponent()
    if key_mask is not None:
        log_rows = log_rows.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    query, query_directions = _flattened(queries, batch, heads)
    operator = _plain if needs_formula() else _exponential_scan
    both, frame, log_scale, sums, *_ = operator(
        query.unflatten(1, (-1, length)),
        query_directions,
        *_flattened(keys, batch, heads),
        log_rows.flatten(0, 1),
        # [V 1]: the column of ones makes the normalizer one more column of the product.
        F.pad(value, (0, 1), value=1.0).flatten(0, 1),
        state.log_scale.flatten(0, 1),
        torch.cat([state.values, state.normalizer.unsqueeze(-1)], dim=-1).flatten(0, 1),
        CHUNK,
        # An exported graph keeps none: their number would tie it to a range of lengths.
        torch.is_grad_enabled() and not torch.compiler.is_exporting(),
    )
    both, frame, log_scale, sums = (
        part.unflatten(0, (batch, heads))
        for part in (both, frame.detach(), log_scale.detach(), sums)
    )
    # The operator leaves out what a row of queries shares, which only moves the frame.
    frame = frame + queries.shared_exponent().unflatten(2, (-1, length))
    after = replace(state, log_scale=log_scale, values=sums[..., :-1], normalizer=sums[..., -1])
    # By `split`, whose gradient is one tensor. Two slices would have two, each of the whole width.
    numerator, normalizer = both.split([value.shape[-1], 1], dim=-1)
    return Partial(numerator, normalizer, frame), after


def _flattened(part: LogLinear, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Inputs and directions with batch and heads as one dimension; a tilt becomes a column."""
    inputs, directions = part.inputs, part.directions
    if part.tilt is not None:
        # inputs·directions + tilt = [inputs 1]·[directions tilt]
        inputs = F.pad(inputs, (0, 1), value=1.0)
        directions = torch.cat([directions, part.tilt.unsqueeze(-1)], dim=-1)
    directions = directions.expand(batch, heads, *directions.shape[-2:])
    return inputs.flatten(0, 1), directions.flatten(0, 1)


# In what follows: heads = batch · key_heads; width = value_dim + 1, the columns of [V 1];
# rows = group · chunk.


@dataclass
class _Carried:
    """What is carried from chunk to chunk: S in a frame, and the largest exponent seen, which is
    the next frame. They are kept apart so that S is multiplied by a new factor only once per chunk.
    """

    frame: Float[Tensor, "heads num_features"]
    highest: Float[Tensor, "heads num_features"]
    sums: Float[Tensor, "heads num_features width"]

    def decay(self, frame: Float[Tensor, "heads num_features"]) -> Tensor:
        """The factor that brings S to another frame."""
        return exp_difference(self.frame, frame).unsqueeze(-1)

    def settled(self) -> tuple[Tensor, Tensor]:
        """The largest exponent seen, and S in that frame."""
        return self.highest, self.sums * self.decay(self.highest)


class _Pass(NamedTuple):
    """One pass over a chunk: K′ of its keys, and S before them, in its frame.

    `inside` marks the keys and rows of the pass, None for all; K′ is 0 for the other keys. `decay`
    has brought S from the frame before. `is_last`: no pass over this chunk comes after.
    """

    chunk: slice
    is_last: bool
    key_weights: Float[Tensor, "heads chunk num_features"]
    inside: Bool[Tensor, "heads chunk"] | None
    frame: Float[Tensor, "heads num_features"]
    decay: Float[Tensor, "heads num_features 1"]
    sums: Float[Tensor, "heads num_features width"]


def _passes(
    carried: _Carried,
    key: Float[Tensor, "heads length dim"],
    directions: Float[Tensor, "heads num_features dim"],
    log_rows: Float[Tensor, "heads length 1"],
    value: Float[Tensor, "heads length width"],
    chunk: slice,
) -> Iterator[_Pass]:
    """The passes over a chunk, nearly always one. Afterwards `carried` has absorbed its keys.

    Q′K′ᵀ is one matrix product, which needs one frame per feature for all rows. A maximum over the
    whole chunk would be a frame in which a large later key pushes an earlier row's keys to 0, and
    would leak the future through rounding. So the frame is the maximum of the state's frame and the
    exponent of the first key. With it, the rows before the first key that rises more than MAX_RISE
    above it are finished. A further pass, whose frame has absorbed these rows, starts at that key.
    Every head has passes of its own.
    """
    exponent = torch.baddbmm(log_rows[:, chunk], key[:, chunk], directions.mT)
    length = exponent.shape[1]
    first, largest = exponent[:, 0], exponent.amax(dim=1)
    inside = start = None
    while True:
        frame = torch.maximum(carried.highest, first)
        limit = frame + MAX_RISE
        # Here the host waits for the device. Usually no key rises, and one pass is enough.
        is_last = not bool((largest > limit).any())
        if start is not None or not is_last:
            if start is None:
                start = torch.zeros(len(key), dtype=torch.int64, device=key.device)
            inside, start = rows_below(limit[:, None], exponent, start)
            is_last = bool((start == length).all())

        weights = exponent
        if inside is not None:
            # Keys of other passes get weight 0 here, and do not count for the next frame.
            weights = weights.masked_fill(~inside[..., None], -torch.inf)
            largest = weights.amax(dim=1)
        weights = exp_difference(weights, frame[:, None])
        decay = carried.decay(frame)
        sums = carried.sums * decay
        yield _Pass(chunk, is_last, weights, inside, frame, decay, sums)

        carried.frame = frame
        carried.highest = torch.maximum(frame, largest)
        carried.sums = torch.baddbmm(sums, weights.mT, value[:, chunk])
        if is_last:
            return
        assert start is not None, "a chunk with several passes has a first unfinished row"
        first = exponent_at(start, exponent)


def _query_weights(
    logits: Float[Tensor, "heads rows num_features"], frame: Float[Tensor, "heads num_features"]
) -> tuple[Float[Tensor, "heads rows num_features"], Float[Tensor, "heads rows 1"]]:
    """Q′ and its frame c."""
    exponent = logits + frame[:, None]
    row_frame = exponent.amax(dim=-1, keepdim=True)
    return exp_difference(exponent, row_frame), row_frame


def _lower(scores: Float[Tensor, "heads rows chunk"]) -> Float[Tensor, "heads rows chunk"]:
    """Set the scores of later keys to 0, in place. Rows are those of the group's heads in turn."""
    chunk = scores.shape[-1]
    scores.unflatten(1, (-1, chunk)).tril_()
    return scores


def _rows(x: Float[Tensor, "heads group length _"], chunk: slice) -> Tensor:
    return x[:, :, chunk].flatten(1, 2)


def _chunks(start: int, stop: int, chunk_size: int) -> Iterator[slice]:
    for position in range(start, stop, chunk_size):
        yield slice(position, min(position + chunk_size, stop))


def _segment(num_features: int, chunk_size: int) -> int:
    """Positions between the states that are kept: whole chunks, about `num_features`."""
    return max(1, num_features // chunk_size) * chunk_size


def _plain(
    query: Tensor,
    query_directions: Tensor,
    key: Tensor,
    key_directions: Tensor,
    log_rows: Tensor,
    value: Tensor,
    log_scale: Tensor,
    sums: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four outputs of the operator as a formula, in frames of its own."""
    # a head as a batch of one key head
    queries = Features(log_values=(query.flatten(1, 2) @ query_directions.mT).unsqueeze(1))
    keys = Features(
        log_values=(key @ key_directions.mT).unsqueeze(1), log_rows=log_rows.unsqueeze(1)
    )
    state = plain.state_of_heads(log_scale, sums[..., -1], sums[..., :-1])
    partial, after = plain.causal(
        state, queries, keys, value[..., :-1].unsqueeze(1), None, query.shape[1]
    )
    both = torch.cat([partial.numerator, partial.normalizer], dim=-1)
    sums = torch.cat([after.values, after.normalizer.unsqueeze(-1)], dim=-1)
    both, frame = (part.squeeze(1).unflatten(1, query.shape[1:3]) for part in (both, partial.frame))
    return both, frame, after.log_scale.squeeze(1), sums.squeeze(1)


@torch.library.custom_op(
    "performers::exponential_scan",
    mutates_args=(),
    schema="(Tensor query, Tensor query_directions, Tensor key, Tensor key_directions, "
    "Tensor log_rows, Tensor value, Tensor log_scale, Tensor sums, int chunk_size, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _exponential_scan(
    query: Tensor,
    query_directions: Tensor,
    key: Tensor,
    key_directions: Tensor,
    log_rows: Tensor,
    value: Tensor,
    log_scale: Tensor,
    sums: Tensor,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both sums of every row and their frames; log-scale and sums of the last state; the same of
    the states that backward starts from, one per segment. Without `keep` there are none, and
    backward makes them first.

    query: [heads, group, length, dim]; value: [heads, length, width], its last column 1.
    """
    length = query.shape[2]
    segment = _segment(sums.shape[1], chunk_size)
    both = query.new_empty(*query.shape[:3], value.shape[-1])
    frames = query.new_empty(*query.shape[:3], 1)
    kept = []
    for start in range(0, length, segment):
        if keep:
            kept.append((log_scale, sums))
        carried = _Carried(log_scale, log_scale, sums)
        for chunk in _chunks(start, min(start + segment, length), chunk_size):
            logits = _rows(query, chunk) @ query_directions.mT
            for step in _passes(carried, key, key_directions, log_rows, value, chunk):
                query_weights, row_frame = _query_weights(logits, step.frame)
                scores = _lower(query_weights @ step.key_weights.mT)
                rows = torch.baddbmm(scores @ value[:, chunk], query_weights, step.sums)
                for whole, part in ((both, rows), (frames, row_frame)):
                    part = part.unflatten(1, (query.shape[1], -1))
                    if step.inside is not None:
                        # Other rows were finished by an earlier pass, or will be overwritten by a
                        # later one.
                        part = torch.where(step.inside[:, None, :, None], part, whole[:, :, chunk])
                    whole[:, :, chunk] = part
        log_scale, sums = carried.settled()
    if not kept:
        kept = [(log_scale[:0], sums[:0])]
    log_scales, states = (torch.stack(parts) for parts in zip(*kept, strict=True))
    return both, frames, log_scale, sums, log_scales, states


@_exponential_scan.register_fake
def _(
    query: Tensor,
    query_directions: Tensor,
    key: Tensor,
    key_directions: Tensor,
    log_rows: Tensor,
    value: Tensor,
    log_scale: Tensor,
    sums: Tensor,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    segment = _segment(sums.shape[1], chunk_size)
    count = (query.shape[2] + segment - 1) // segment if keep else 1
    heads = query.shape[0] if keep else 0
    return (
        query.new_empty(*query.shape[:3], value.shape[-1]),
        query.new_empty(*query.shape[:3], 1),
        torch.empty_like(log_scale),
        torch.empty_like(sums),
        log_scale.new_empty(count, heads, *log_scale.shape[1:]),
        sums.new_empty(count, heads, *sums.shape[1:]),
    )


@torch.library.custom_op(
    "performers::exponential_scan_backward",
    mutates_args=(),
    schema="(Tensor both_gradient, Tensor sums_gradient, Tensor query, Tensor query_directions, "
    "Tensor key, Tensor key_directions, Tensor log_rows, Tensor value, Tensor log_scales, "
    "Tensor states, int chunk_size, bool with_directions) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _exponential_scan_backward(
    both_gradient: Tensor,
    sums_gradient: Tensor,
    query: Tensor,
    query_directions: Tensor,
    key: Tensor,
    key_directions: Tensor,
    log_rows: Tensor,
    value: Tensor,
    log_scales: Tensor,
    states: Tensor,
    chunk_size: int,
    with_directions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, its directions, key, its directions, log_rows, value and sums."""
    group, length = query.shape[1:3]
    segment = _segment(states.shape[2], chunk_size)
    query_gradient, key_gradient = torch.empty_like(query), torch.empty_like(key)
    rows_gradient, value_gradient = torch.empty_like(log_rows), torch.empty_like(value)
    shape = query_directions.shape if with_directions else (0,)
    query_directions_gradient = query.new_zeros(shape)
    key_directions_gradient = query.new_zeros(shape)
    carried_gradient = sums_gradient
    for index in reversed(range(len(states))):
        carried = _Carried(log_scales[index], log_scales[index], states[index])
        start = index * segment
        # The passes are repeated from the segment's state, and then gone through from the end.
        steps = [
            step
            for chunk in _chunks(start, min(start + segment, length), chunk_size)
            for step in _passes(carried, key, key_directions, log_rows, value, chunk)
        ]
        # The gradient is that of S in the last frame; this brings it to the frame of the last pass.
        carried_gradient = carried_gradient * carried.decay(carried.highest)
        for step in reversed(steps):
            chunk, key_weights = step.chunk, step.key_weights
            queries, keys, values = _rows(query, chunk), key[:, chunk], value[:, chunk]
            gradient = _rows(both_gradient, chunk)
            if step.inside is not None:
                # Rows that another pass has finished get nothing from this one.
                gradient = gradient * step.inside.repeat(1, group)[..., None]
            query_weights, _ = _query_weights(queries @ query_directions.mT, step.frame)
            scores = _lower(query_weights @ key_weights.mT)
            scores_gradient = _lower(gradient @ values.mT)

            values_part = torch.baddbmm(scores.mT @ gradient, key_weights, carried_gradient)
            # Q′ and K′ are exponentials, so dQ′ · Q′ and dK′ · K′ are the gradients of exponents.
            queries_part = torch.baddbmm(scores_gradient @ key_weights, gradient, step.sums.mT)
            queries_part *= query_weights
            keys_part = torch.baddbmm(
                scores_gradient.mT @ query_weights, values, carried_gradient.mT
            )
            keys_part *= key_weights
            if with_directions:
                query_directions_gradient.baddbmm_(queries_part.mT, queries)
                key_directions_gradient.baddbmm_(keys_part.mT, keys)
            for whole, part in (
                (query_gradient, (queries_part @ query_directions).unflatten(1, (group, -1))),
                (key_gradient, keys_part @ key_directions),
                (rows_gradient, keys_part.sum(dim=-1, keepdim=True)),
                (value_gradient, values_part),
            ):
                if step.is_last:  # the first to come back
                    whole[..., chunk, :] = part
                else:
                    whole[..., chunk, :] += part
            carried_gradient = torch.baddbmm(carried_gradient, query_weights.mT, gradient)
            # S was multiplied by this factor on the way forward, so its gradient is, too.
            carried_gradient *= step.decay
    return (
        query_gradient,
        query_directions_gradient,
        key_gradient,
        key_directions_gradient,
        rows_gradient,
        value_gradient,
        carried_gradient,
    )


@_exponential_scan_backward.register_fake
def _(
    both_gradient: Tensor,
    sums_gradient: Tensor,
    query: Tensor,
    query_directions: Tensor,
    key: Tensor,
    key_directions: Tensor,
    log_rows: Tensor,
    value: Tensor,
    log_scales: Tensor,
    states: Tensor,
    chunk_size: int,
    with_directions: bool,
) -> tuple[Tensor, ...]:
    directions = (query_directions, key_directions)
    shapes = [part.shape if with_directions else (0,) for part in directions]
    return (
        torch.empty_like(query),
        query.new_empty(shapes[0]),
        torch.empty_like(key),
        query.new_empty(shapes[1]),
        torch.empty_like(log_rows),
        torch.empty_like(value),
        torch.empty_like(sums_gradient),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    *parts, ctx.chunk_size, _ = inputs
    ctx.save_for_backward(*parts, *output[4:])


def _plain_gradients(
    ctx: Any, inputs: tuple[Tensor, ...], both: Tensor | None, sums: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients through the formula, of outputs in the frames that the operator had."""
    with torch.no_grad():
        _, frames, log_scale, *_ = _exponential_scan(*inputs, ctx.chunk_size, False)

    def in_frames(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        own, own_frames, own_log_scale, own_sums = _plain(*inputs)
        decay = exp_difference(own_log_scale.detach(), log_scale).unsqueeze(-1)
        return own * exp_difference(own_frames.detach(), frames), own_sums * decay

    is_log_scale = 6
    needed = [need and index != is_log_scale for index, need in enumerate(ctx.needs_input_grad[:8])]
    return *plain_gradients(in_frames, inputs, needed, (both, sums)), None, None


def _differentiate(
    ctx: Any, both: Tensor | None, _: Any, __: Any, sums: Tensor | None, *___: Any
) -> tuple[Tensor | None, ...]:
    """The gradients by the operator above; frames and log-scales are never differentiated."""
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    if is_differentiated():
        return _plain_gradients(ctx, saved[:8], both, sums)
    if not saved[9].shape[1]:
        saved = *saved[:8], *_exponential_scan(*saved[:8], ctx.chunk_size, True)[4:]
    query, value, states = saved[0], saved[5], saved[9]
    if both is None:
        both = value.new_zeros(*query.shape[:3], value.shape[-1])
    if sums is None:
        sums = torch.zeros_like(states[0])
    with_directions = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    *gradients, sums = _exponential_scan_backward(
        both, sums, *saved[:6], *saved[8:], ctx.chunk_size, with_directions
    )
    if not with_directions:
        gradients[1] = gradients[3] = None
    return *gradients, None, sums, None, None


_exponential_scan.register_autograd(_differentiate, setup_context=_keep)
