"""Attention with features f(ω·x) + ε, a tile at a time, forward and backward by hand.

Such features have no exponents, so sums need no frame (no running maximum, as in an online
softmax). With c = 1/√columns, φ = c F and tiles

    F_k = f(K Ωᵀ) + ε        F_q = f(Q Ωᵀ) + ε        G = gradient of [numerator, normalizer] / c

bidirectional attention is four sweeps over tiles, two there and two back:

    S ← S + c F_kᵀ [V 1]          out = c D⁻¹ F_q S
    T ← T + F_qᵀ G               dF_q = G Sᵀ
                                 dF_k = c [V 1] Tᵀ                  d[V 1] = c F_k T

Causal attention is in `kernel_chunks`. Every sweep computes the features that it needs, so what is
kept for the backward pass is inputs, output, and a number per row.

Registered with torch.library: `torch.compile(fullgraph=True)` sees one operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends import kernel_chunks, plain
from performers.backends.buffers import CAPABILITIES, buffers, room_of_outputs, slices
from performers.backends.call import Call
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients
from performers.backends.kernel_maps import Map, columns, inverse, of_heads, tiles_of
from performers.backends.reference import absorb, read
from performers.kernels import KERNELS
from performers.state import LinearState
from performers.typing import Elementwise, Features

__all__ = ["attend"]

HEADS = 8  # in one matrix product; more where all features of more fit into a tile
ROWS = 64  # of which a tile has a multiple

# Of a tile of features. Twice the second-level cache, but assign what suits your processor.
TILE_BYTES = 2 * (CAPABILITIES.get("l2_cache_size") or 2**20)


def attend(
    call: Call,
    form: Elementwise,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention and the state after it, equal to the reference up to rounding."""
    batch, heads = key.shape[:2]
    presence = None
    if key_mask is not None:
        presence = (
            key_mask[:, None, :, None].expand(batch, heads, -1, 1).flatten(0, 1).to(call.dtype)
        )
    else:
        key_mask = torch.ones(batch, key.shape[2], dtype=torch.bool, device=key.device)
    seen = key_mask.any(dim=1)[:, None, None]
    # Without exponents every frame but that of an empty state is 0.
    frame = torch.zeros_like(state.log_scale)
    before = state.rescaled(frame)
    operator = _plain if needs_formula() else _kernel_attention
    out, _, normalizer, values, *_ = operator(
        query.flatten(0, 1),
        key.flatten(0, 1),
        value.flatten(0, 1),
        None if form.directions is None else form.directions.to(call.dtype),
        presence,
        before.normalizer.flatten(0, 1),
        before.values.flatten(0, 1),
        form.kernel,
        form.epsilon,
        call.root,
        call.is_causal,
        call.normalize,
    )
    is_empty = (state.log_scale == -torch.inf) & ~seen
    after = replace(
        state,
        log_scale=frame.masked_fill(is_empty, -torch.inf),
        normalizer=normalizer.unflatten(0, (batch, heads)),
        values=values.unflatten(0, (batch, heads)),
    )
    return out.unflatten(0, (batch, heads)), after


# In what follows: heads = batch · key_heads.


class _Sums(NamedTuple):
    """S in two parts, that of 1 and that of V, or T: a product with 65 columns costs a fifth more
    than one with 64, and one with a single column more than both.
    """

    normalizer: Float[Tensor, "heads num_features"]
    values: Float[Tensor, "heads num_features value_dim"]

    def of(self, heads: slice) -> _Sums:
        return _Sums(self.normalizer[heads], self.values[heads])

    def add(self, features: Tensor, values: Tensor, weight: Tensor | None, factor: float) -> None:
        """Add factor · Fᵀ [weight values], weight 1 if None."""
        self.values.baddbmm_(features.mT, values, alpha=factor)
        if weight is None:
            total = features.sum(dim=1)
        else:
            total = buffers.product("total", weight.mT, features).squeeze(1)
        self.normalizer.add_(total, alpha=factor)


def _sizes(values: Float[Tensor, "heads num_features value_dim"], longest: int) -> tuple[int, int]:
    """Heads and rows of a tile, for so many rows of a head at most."""
    count, num_features = max(1, len(values)), values.shape[1]
    if values.device.type != "cpu":
        return count, 8 * ROWS
    rows = TILE_BYTES // (min(HEADS, count) * num_features * values.dtype.itemsize)
    whole = TILE_BYTES // (max(1, longest * num_features) * values.dtype.itemsize)
    return max(HEADS, whole), max(ROWS, rows // ROWS * ROWS)


def _tiles(size: int, *parts: Float[Tensor, "*heads length _"] | None) -> list[tuple[Any, ...]]:
    """The parts, each cut into tiles of so many rows; None stays None."""
    return tiles_of(lambda x: x.split(size, dim=-2), *parts)


def _members(tile: tuple[Float[Tensor, "heads group rows _"], ...]) -> Iterator[tuple[Any, ...]]:
    """What a tile has of each query that shares keys."""
    return zip(*(x.unbind(1) for x in tile), strict=True)


@torch.library.custom_op(
    "performers::kernel_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? directions, Tensor? presence, "
    "Tensor normalizer, Tensor values, str kernel, float epsilon, float root, bool is_causal, "
    "bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    directions: Tensor | None,
    presence: Tensor | None,
    normalizer: Tensor,
    values: Tensor,
    kernel: str,
    epsilon: float,
    root: float,
    is_causal: bool,
    normalize: bool,
) -> tuple[Tensor, ...]:
    """The output; for each row c / D, which it was multiplied by; S after all keys, in two parts;
    and the starts of causal tiles but the first.

    query: [heads, group, query_length, dim]; presence: [heads, key_length, 1], 0 for masked keys.
    """
    phi = Map(kernel, epsilon, root, directions, values)
    if is_causal:
        *results, starts = kernel_chunks.forward(
            phi, query, key, value, presence, normalizer, values, normalize
        )
        return (*results, *starts)
    out = room_of_outputs(query, value)
    rates = values.new_full((*query.shape[:3], 1), phi.factor)
    sums = _Sums(normalizer.clone(), values.clone())
    head_count, row_count = _sizes(values, max(query.shape[1] * query.shape[2], key.shape[1]))
    for heads in slices(len(query), head_count):
        state = sums.of(heads)
        parts = key[heads], value[heads], of_heads(presence, heads)
        for own_key, own_value, present in _tiles(row_count, *parts):
            keys = phi.features(phi.projected("rows", own_key), present)
            state.add(keys, phi.wide("value", own_value), None, phi.factor)
        for tile in _tiles(row_count, query[heads], out[heads], rates[heads]):
            for own_query, room, rate in _members(tile):
                queries = phi.features(phi.projected("rows", own_query))
                found = buffers.product("found", queries, state.values)
                # The vector on the left, where BLAS is fast.
                left = state.normalizer.unsqueeze(1)
                total = buffers.product("total", left, queries.mT).mT
                if normalize:
                    # `rates` begins as c: found · c is the numerator, total · c the normalizer.
                    rate.mul_(inverse(total * phi.factor, phi.kernel.is_nonnegative))
                torch.mul(found, rate, out=room)
    return (out, rates, *sums, *kernel_chunks.room_of_starts(values, 1))


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    directions: Tensor | None,
    presence: Tensor | None,
    normalizer: Tensor,
    values: Tensor,
    kernel: str,
    epsilon: float,
    root: float,
    is_causal: bool,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator as a formula, all features at once."""
    row, dtype = KERNELS[kernel], values.dtype
    factor = 1.0 if directions is None else 1 / math.sqrt(len(directions))

    def features(x: Tensor) -> Tensor:
        """Of rows [heads, rows, dim], a head as a batch of one key head."""
        projected = x.to(dtype) * root
        if directions is not None:
            projected = projected @ directions.mT
        return ((row.fn(projected) + epsilon) * factor).unsqueeze(1)

    of_keys, wide = features(key), value.to(dtype).unsqueeze(1)
    if presence is not None:
        of_keys = of_keys * presence.unsqueeze(1)
    queries, keys = Features(features(query.flatten(1, 2))), Features(of_keys)
    state = plain.state_of_heads(torch.zeros_like(normalizer), normalizer, values)
    if is_causal:
        partial, state = plain.causal(state, queries, keys, wide, None, query.shape[1])
    else:
        state = absorb(state, keys, wide, None)
        partial = read(state, queries)
    rates = torch.full_like(partial.normalizer, factor)
    if normalize:
        rates = rates * inverse(partial.normalizer, row.is_nonnegative)
    out = partial.numerator * (rates / factor)
    out, rates = (x.squeeze(1).unflatten(1, query.shape[1:3]) for x in (out, rates))
    return out.to(query.dtype), rates, state.normalizer.squeeze(1), state.values.squeeze(1)


@_kernel_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, directions: Tensor | None, presence: Tensor | None,
    normalizer: Tensor, values: Tensor, kernel: str, epsilon: float, root: float, is_causal: bool,
    normalize: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        room_of_outputs(query, value),
        values.new_empty(*query.shape[:3], 1),
        torch.empty_like(normalizer),
        torch.empty_like(values),
        *kernel_chunks.room_of_starts(values, key.shape[1] if is_causal else 1),
    )


@torch.library.custom_op(
    "performers::kernel_attention_backward",
    mutates_args=(),
    schema="(Tensor out_gradient, Tensor normalizer_gradient, Tensor values_gradient, "
    "Tensor query, Tensor key, Tensor value, Tensor? directions, Tensor? presence, "
    "Tensor normalizer, Tensor values, Tensor out, Tensor rates, str kernel, float epsilon, "
    "float root, bool is_causal, bool normalize, bool with_directions) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _kernel_attention_backward(
    out_gradient: Tensor,
    normalizer_gradient: Tensor,
    values_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    directions: Tensor | None,
    presence: Tensor | None,
    normalizer: Tensor,
    values: Tensor,
    out: Tensor,
    rates: Tensor,
    kernel: str,
    epsilon: float,
    root: float,
    is_causal: bool,
    normalize: bool,
    with_directions: bool,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, directions (empty unless asked for) and of S before the keys.

    `normalizer` and `values` are S after the keys, and in causal attention S before each tile.
    """
    phi = Map(kernel, epsilon, root, directions, values)
    if with_directions and directions is not None:
        phi.of_directions = torch.zeros_like(directions)
    of_directions = query.new_empty(0) if phi.of_directions is None else phi.of_directions
    if is_causal:
        starts = kernel_chunks.Starts(normalizer, values)
        *of_inputs, of_normalizer, of_values = kernel_chunks.backward(
            phi, out_gradient, normalizer_gradient, values_gradient, query, key, value, presence,
            starts, out, rates, normalize,
        )  # fmt: skip
        return (*of_inputs, of_directions, of_normalizer, of_values)
    factor = phi.factor
    query_gradient, key_gradient = torch.empty_like(query), torch.empty_like(key)
    value_gradient = torch.empty_like(value)
    sums = _Sums(normalizer, values)
    sums_gradient = _Sums(normalizer_gradient.clone(), values_gradient.clone())
    head_count, row_count = _sizes(values, max(query.shape[1] * query.shape[2], key.shape[1]))
    for heads in slices(len(query), head_count):
        state, later = sums.of(heads), sums_gradient.of(heads)
        query_tiles = _tiles(
            row_count, query[heads], out_gradient[heads], out[heads], rates[heads],
            query_gradient[heads],
        )  # fmt: skip
        for tile in query_tiles:
            for own_query, of_out, own_out, rate, of_query in _members(tile):
                projected = phi.projected("rows", own_query)
                gradient, along = columns(of_out, own_out, rate, normalize)
                of_queries = buffers.product("of features", gradient, state.values.mT)
                of_queries.addcmul_(along, state.normalizer.unsqueeze(1))
                later.add(phi.features(projected, None, "rows"), gradient, along, 1.0)
                phi.backward(of_queries, projected, own_query, of_query)
        key_tiles = _tiles(
            row_count, key[heads], value[heads], of_heads(presence, heads), key_gradient[heads],
            value_gradient[heads],
        )  # fmt: skip
        for own_key, own_value, present, of_key, of_value in key_tiles:
            projected = phi.projected("rows", own_key)
            keys = phi.features(projected, present, "rows")
            own_values = phi.wide("value", own_value)
            of_keys = buffers.product("of features", own_values, later.values.mT, factor)
            of_keys.add_(later.normalizer.unsqueeze(1), alpha=factor)
            of_value.copy_(buffers.product("of values", keys, later.values, factor))
            if present is not None:
                # A masked key has features 0 whatever it is, so no gradient reaches it.
                of_keys.mul_(present)
            phi.backward(of_keys, projected, own_key, of_key)
    return query_gradient, key_gradient, value_gradient, of_directions, *sums_gradient


@_kernel_attention_backward.register_fake
def _(
    out_gradient: Tensor, normalizer_gradient: Tensor, values_gradient: Tensor, query: Tensor,
    key: Tensor, value: Tensor, directions: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    *_, with_directions = rest
    return (
        torch.empty_like(query),
        torch.empty_like(key),
        torch.empty_like(value),
        query.new_empty(0)
        if directions is None or not with_directions
        else torch.empty_like(directions),
        torch.empty_like(normalizer_gradient),
        torch.empty_like(values_gradient),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    out, rates, *after, start_ones, start_values = output
    *ctx.settings, ctx.normalize = inputs[7:]
    ctx.mark_non_differentiable(rates, start_ones, start_values)
    is_causal = ctx.settings[-1]
    sums = (start_ones, start_values) if is_causal else after
    ctx.save_for_backward(*inputs[:7], *sums, out, rates)


def _differentiate(
    ctx: Any, out: Tensor | None, _: Any, normalizer: Tensor | None, values: Tensor | None, *__: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    if is_differentiated():
        arguments = (*saved[:7], *ctx.settings, ctx.normalize)
        gradients_of = (out, None, normalizer, values)
        return plain_gradients(_plain, arguments, ctx.needs_input_grad, gradients_of)
    likes = saved[-2], saved[5], saved[6]
    gradients = [
        torch.zeros_like(like) if gradient is None else gradient
        for gradient, like in zip((out, normalizer, values), likes, strict=True)
    ]
    with_directions = ctx.needs_input_grad[3]
    sums, is_causal = saved[7:9], ctx.settings[-1]
    if is_causal:  # the first tile begins with S before the keys
        before = (x.unsqueeze(1) for x in saved[5:7])
        sums = [torch.cat(both, dim=1) for both in zip(before, sums, strict=True)]
    query, key, value, directions, normalizer, values = _kernel_attention_backward(
        *gradients, *saved[:5], *sums, *saved[9:], *ctx.settings, ctx.normalize, with_directions
    )
    of_directions = directions if with_directions else None
    return query, key, value, of_directions, None, normalizer, values, *[None] * 5


_kernel_attention.register_autograd(_differentiate, setup_context=_keep)
