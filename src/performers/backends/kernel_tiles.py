"""Attention with features f(ω·x) + ε, a tile at a time, forward and backward by hand.

Such features have no exponents, so sums need no frame (no running maximum, as in an online
softmax). With c = 1/√columns, φ = c F and tiles

    F_k = f(K Ωᵀ) + ε        F_q = f(Q Ωᵀ) + ε        G = gradient of [numerator, normalizer] / c

forward and backward are three sweeps over tiles, the last from the end:

    S ← S + c F_kᵀ [V 1]          out = c D⁻¹ (F_q S + P V)         P = c tril(F_q F_kᵀ)
    S ← S + c F_kᵀ [V 1]         dF_q = G Sᵀ + R F_k                R = c tril(G [V 1]ᵀ)
    T ← T + F_qᵀ G               dF_k = c [V 1] Tᵀ + Rᵀ F_q         d[V 1] = c F_k T + Pᵀ G

P and R stand for the tile itself and are there in causal attention only. Bidirectional attention
has all of S before it reads, and all of T before dF_k. Every sweep computes the features that it
needs, so what is kept for the backward pass is inputs, output, and a number per row.

Registered with torch.library: `torch.compile(fullgraph=True)` sees one operator.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends import plain
from performers.backends.buffers import CAPABILITIES, buffers, room_of_outputs, slices
from performers.backends.call import Call
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients
from performers.backends.reference import absorb, read, renormalized
from performers.kernels import KERNELS
from performers.state import LinearState
from performers.typing import Elementwise, Features

__all__ = ["attend"]

HEADS = 8  # in one matrix product; more where all features of more fit into a tile
CHUNK = 64  # positions of a causal tile

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
    out, _, normalizer, values = operator(
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


class _Map:
    """F of some heads, a tile at a time, and what flows back through it."""

    def __init__(
        self,
        kernel: str,
        epsilon: float,
        root: float,
        directions: Float[Tensor, "num_features dim"] | None,
        like: Tensor,
    ) -> None:
        self.kernel = KERNELS[kernel]
        self.epsilon = like.new_tensor(epsilon)  # a number would be made one at each sum
        self.root = root
        self.directions = directions
        self.factor = 1.0 if directions is None else 1 / math.sqrt(len(directions))
        self.like = like
        self.of_directions: Tensor | None = None  # where their gradient is added up

    def wide(self, name: str, x: Tensor) -> Tensor:
        """x in the precision of the sums."""
        return x if x.dtype == self.like.dtype else buffers.copied(name, x, self.like)

    def projected(self, name: str, x: Tensor) -> Float[Tensor, "heads rows num_features"]:
        """u = root · x·directions."""
        x = self.wide(f"{name} inputs", x)
        if self.directions is None:
            return buffers.copied(name, x, self.like).mul_(self.root)
        return buffers.product(name, x, self.directions.expand(x.shape[0], -1, -1).mT, self.root)

    def features(
        self, projected: Float[Tensor, "heads rows num_features"], presence: Tensor | None = None
    ) -> Float[Tensor, "heads rows num_features"]:
        """F = f(u) + ε, and 0 for masked keys."""
        features = self.kernel.fn(projected)
        if features is projected:  # which the backward pass needs as it is
            features = projected.clone()
        features.add_(self.epsilon)
        return features if presence is None else features.mul_(presence)

    def scores(self, queries: Tensor, keys: Tensor) -> Float[Tensor, "heads rows rows"]:
        """P, of features."""
        return buffers.product("scores", queries, keys.mT, self.factor).tril_()

    def backward(self, gradient: Tensor, projected: Tensor, x: Tensor, of_x: Tensor) -> None:
        """Given the gradient of F, write that of x, and add that of the directions if asked for."""
        assert self.kernel.backward is not None, "Elementwise names a kernel with a derivative"
        gradient = self.kernel.backward(gradient, projected)
        if self.directions is None:
            torch.mul(gradient, self.root, out=of_x)
            return
        if self.of_directions is not None:
            gradients = buffers.product("of directions", gradient.mT, self.wide("wide", x))
            self.of_directions.add_(gradients.sum(dim=0), alpha=self.root)
        directions = self.directions.expand(gradient.shape[0], -1, -1)
        of_x.copy_(buffers.product("of inputs", gradient, directions, self.root))


def _sizes(
    values: Float[Tensor, "heads num_features value_dim"], longest: int, is_causal: bool
) -> list[int]:
    """Heads and rows of a tile, for so many rows of a head at most."""
    count, num_features = max(1, len(values)), values.shape[1]
    if values.device.type != "cpu":
        return [count, CHUNK if is_causal else 8 * CHUNK]
    rows = TILE_BYTES // (min(HEADS, count) * num_features * values.dtype.itemsize)
    whole = TILE_BYTES // (max(1, longest * num_features) * values.dtype.itemsize)
    return [max(HEADS, whole), CHUNK if is_causal else max(CHUNK, rows // CHUNK * CHUNK)]


def _of(x: Tensor | None, heads: slice) -> Tensor | None:
    return None if x is None else x[heads]


def _tiles(size: int, *parts: Float[Tensor, "*heads length _"] | None) -> list[tuple[Any, ...]]:
    """The parts, each cut into tiles of so many rows; None stays None."""
    cut = (itertools.repeat(None) if x is None else x.split(size, dim=-2) for x in parts)
    return list(zip(*cut, strict=False))


def _members(tile: tuple[Float[Tensor, "heads group rows _"], ...]) -> Iterator[tuple[Any, ...]]:
    """What a tile has of each query that shares keys."""
    return zip(*(x.unbind(1) for x in tile), strict=True)


@torch.library.custom_op(
    "performers::kernel_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? directions, Tensor? presence, "
    "Tensor normalizer, Tensor values, str kernel, float epsilon, float root, bool is_causal, "
    "bool normalize) -> (Tensor, Tensor, Tensor, Tensor)",
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output; for each row c / D, which it was multiplied by; S after all keys, in two parts.

    query: [heads, group, query_length, dim]; presence: [heads, key_length, 1], 0 for masked keys.
    """
    phi = _Map(kernel, epsilon, root, directions, values)
    out = room_of_outputs(query, value)
    rates = values.new_full((*query.shape[:3], 1), phi.factor)
    sums = _Sums(normalizer.clone(), values.clone())
    longest = max(query.shape[1] * query.shape[2], key.shape[1])
    head_count, row_count = _sizes(values, longest, is_causal)
    for heads in slices(len(query), head_count):
        state = sums.of(heads)

        key_tiles = _tiles(row_count, key[heads], value[heads], _of(presence, heads))
        query_tiles = _tiles(row_count, query[heads], out[heads], rates[heads])

        def keys_of(
            own_key: Tensor, own_value: Tensor, present: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            """F of keys, and V."""
            keys = phi.features(phi.projected("key", own_key), present)
            return keys, phi.wide("value", own_value)

        if not is_causal:
            for tile in key_tiles:
                state.add(*keys_of(*tile), None, phi.factor)
        for index, tile in enumerate(query_tiles):
            if is_causal:
                keys, own_values = keys_of(*key_tiles[index])
            for own_query, room, rate in _members(tile):
                queries = phi.features(phi.projected("query", own_query))
                found = buffers.product("found", queries, state.values)
                # The vector on the left, where BLAS is fast.
                left = state.normalizer.unsqueeze(1)
                total = buffers.product("total", left, queries.mT).mT
                if is_causal:
                    scores = phi.scores(queries, keys)
                    found.baddbmm_(scores, own_values)
                    total = total + scores.sum(dim=-1, keepdim=True)
                if normalize:
                    # `rates` begins as c: found · c is the numerator, total · c the normalizer.
                    rate.mul_(_inverse(total * phi.factor, phi.kernel.is_nonnegative))
                torch.mul(found, rate, out=room)
            if is_causal:
                state.add(keys, own_values, None, phi.factor)
    return out, rates, *sums


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
        rates = rates * _inverse(partial.normalizer, row.is_nonnegative)
    out = partial.numerator * (rates / factor)
    out, rates = (x.squeeze(1).unflatten(1, query.shape[1:3]) for x in (out, rates))
    return out.to(query.dtype), rates, state.normalizer.squeeze(1), state.values.squeeze(1)


def _inverse(normalizer: Tensor, is_nonnegative: bool) -> Tensor:
    """D⁻¹ as `reference.Partial.output` has it."""
    if is_nonnegative:
        return (normalizer + (normalizer == 0)).reciprocal()
    return renormalized(normalizer).reciprocal()


@_kernel_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, directions: Tensor | None, presence: Tensor | None,
    normalizer: Tensor, values: Tensor, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        room_of_outputs(query, value),
        values.new_empty(*query.shape[:3], 1),
        torch.empty_like(normalizer),
        torch.empty_like(values),
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, directions (empty unless asked for) and of S before the keys.

    `normalizer` and `values` are S before the keys in causal attention, and S after them in
    bidirectional attention.
    """
    phi = _Map(kernel, epsilon, root, directions, values)
    factor = phi.factor
    query_gradient, key_gradient = torch.empty_like(query), torch.empty_like(key)
    value_gradient = torch.empty_like(value)
    sums = _Sums(normalizer.clone(), values.clone()) if is_causal else _Sums(normalizer, values)
    sums_gradient = _Sums(normalizer_gradient.clone(), values_gradient.clone())
    along = torch.zeros_like(rates)  # the column of G that belongs to the normalizer
    if with_directions and directions is not None:
        phi.of_directions = torch.zeros_like(directions)
    longest = max(query.shape[1] * query.shape[2], key.shape[1])
    head_count, row_count = _sizes(values, longest, is_causal)
    for heads in slices(len(query), head_count):
        state, later = sums.of(heads), sums_gradient.of(heads)

        key_tiles = _tiles(
            row_count, key[heads], value[heads], _of(presence, heads), key_gradient[heads],
            value_gradient[heads],
        )  # fmt: skip
        query_tiles = _tiles(
            row_count, query[heads], out_gradient[heads], out[heads], rates[heads], along[heads],
            query_gradient[heads],
        )  # fmt: skip

        def keys_of(
            own_key: Tensor, own_value: Tensor, present: Tensor | None, *_: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            """Projections and F of keys, and V."""
            projected = phi.projected("key", own_key)
            return projected, phi.features(projected, present), phi.wide("value", own_value)

        def gradient_of(of_out: Tensor, rate: Tensor) -> Tensor:
            """The columns of G that belong to V."""
            return torch.mul(of_out, rate, out=buffers.take("gradient", of_out.shape, values))

        def scores_gradient(gradient: Tensor, along: Tensor, own_values: Tensor) -> Tensor:
            """R."""
            of_scores = buffers.product("of scores", gradient, own_values.mT, factor)
            return of_scores.add_(along, alpha=factor).tril_()

        for index, tile in enumerate(query_tiles):
            if is_causal:
                _, keys, own_values = keys_of(*key_tiles[index])
            for own_query, of_out, own_out, rate, own_along, of_query in _members(tile):
                projected = phi.projected("query", own_query)
                gradient = gradient_of(of_out, rate)
                if normalize:
                    # From the derivative of 1/D: the normalizer moves all outputs by −out / D.
                    torch.sum(gradient * own_out, dim=-1, keepdim=True, out=own_along).neg_()
                of_queries = buffers.product("of features", gradient, state.values.mT)
                of_queries.addcmul_(own_along, state.normalizer.unsqueeze(1))
                if is_causal:
                    of_scores = scores_gradient(gradient, own_along, own_values)
                    of_queries.baddbmm_(of_scores, keys)
                else:
                    later.add(phi.features(projected), gradient, own_along, 1.0)
                phi.backward(of_queries, projected, own_query, of_query)
            if is_causal:
                state.add(keys, own_values, None, factor)
        for index in reversed(range(len(key_tiles))):
            own_key, _, present, of_key, of_value = key_tiles[index]
            projected, keys, own_values = keys_of(*key_tiles[index])
            of_keys = buffers.product("of features", own_values, later.values.mT, factor)
            of_keys.add_(later.normalizer.unsqueeze(1), alpha=factor)
            of_values = buffers.product("of values", keys, later.values, factor)
            if is_causal:
                for own_query, of_out, _, rate, own_along, _ in _members(query_tiles[index]):
                    queries = phi.features(phi.projected("query", own_query))
                    gradient = gradient_of(of_out, rate)
                    of_scores = scores_gradient(gradient, own_along, own_values)
                    of_keys.baddbmm_(of_scores.mT, queries)
                    of_values.baddbmm_(phi.scores(queries, keys).mT, gradient)
                    later.add(queries, gradient, own_along, 1.0)
            if present is not None:
                # A masked key has features 0 whatever it is, so no gradient reaches it.
                of_keys.mul_(present)
            phi.backward(of_keys, projected, own_key, of_key)
            of_value.copy_(of_values)
    of_directions = query.new_empty(0) if phi.of_directions is None else phi.of_directions
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
    out, rates, *after = output
    *ctx.settings, ctx.normalize = inputs[7:]
    ctx.mark_non_differentiable(rates)
    # Causal: backward sums up S again from the start. Bidirectional: it needs all of S.
    is_causal = ctx.settings[-1]
    ctx.save_for_backward(*inputs[:7], *([] if is_causal else after), out, rates)


def _differentiate(
    ctx: Any, out: Tensor | None, _: Any, normalizer: Tensor | None, values: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    if is_differentiated():
        arguments = (*saved[:7], *ctx.settings, ctx.normalize)
        gradients_of = (out, None, normalizer, values)
        return plain_gradients(_plain, arguments, ctx.needs_input_grad, gradients_of)
    saved = (*saved[:5], *saved[-4:])
    gradients = [
        torch.zeros_like(saved[index]) if gradient is None else gradient
        for index, gradient in ((-2, out), (-4, normalizer), (-3, values))
    ]
    with_directions = ctx.needs_input_grad[3]
    query, key, value, directions, normalizer, values = _kernel_attention_backward(
        *gradients, *saved, *ctx.settings, ctx.normalize, with_directions
    )
    of_directions = directions if with_directions else None
    return query, key, value, of_directions, None, normalizer, values, *[None] * 5


_kernel_attention.register_autograd(_differentiate, setup_context=_keep)
