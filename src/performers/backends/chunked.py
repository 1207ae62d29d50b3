"""The default path: the reference's sums, a tile of keys or queries at a time.

Features exist for one tile only: the backward pass computes them again, so training keeps the
inputs, the outputs and one state per tile, never anything of size length · num_features.

Bidirectional: tiles of keys are absorbed into one state, tiles of queries read it.
Causal: a chunk reads the state before it, attends within itself, and is absorbed:

        state ──►┌───────┐──►┌───────┐──►┌───────┐──► state
                 │chunk 1│   │chunk 2│   │chunk 3│          out = D⁻¹ (Q′ S + tril(Q′ K′ᵀ) V)
                 └───────┘   └───────┘   └───────┘

Exact near field: keys nearer than the window are scored by exp(q·k) itself, in a band around the
diagonal. The far field of position i is then causal attention to keys that come `window_size` later
than they are, so the same scan serves; bidirectional attention runs it from both ends.

        keys    ─── far, before ───┃ near ┃─── far, after ───      (after: bidirectional only)
                                      i
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.reference import Partial, absorb, last_keys, read, with_recent
from performers.backends.tiles import Call, band, causal_chunk, recomputed, tiles
from performers.typing import FeatureMap, LinearState, RecentKeys

__all__ = ["attend"]

KEY_TILE = 512
QUERY_TILE = 512
CAUSAL_CHUNK = 128


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
    """Attention and the state after it, equal to the reference up to rounding."""
    call = Call(phi, root, normalize, state.values.dtype)
    if window_size is not None:
        return _windowed(call, query, key, value, key_mask, is_causal, window_size, state)
    if is_causal:
        return _causal(call, query, key, value, key_mask, state)
    return _bidirectional(call, query, key, value, key_mask, state)


def _bidirectional(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: LinearState,
) -> tuple[Tensor, LinearState]:
    def absorb_tile(
        state: LinearState, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> LinearState:
        features = call.phi.key_features(call.scaled(key))
        return absorb(state, features, value.to(call.dtype), mask)

    def read_tile(state: LinearState, rows: Tensor) -> Tensor:
        return call.output(read(state, call.phi.query_features(call.scaled(rows))))

    for tile in tiles(key.shape[2], KEY_TILE):
        mask = None if key_mask is None else key_mask[:, tile]
        state = recomputed(absorb_tile, state, key[:, :, tile], value[:, :, tile], mask)
    rows = query.flatten(2, 3)
    outputs = [_no_rows(call, rows, value)]
    for tile in tiles(rows.shape[2], QUERY_TILE):
        outputs.append(recomputed(read_tile, state, rows[:, :, tile]))
    return torch.cat(outputs, dim=2).unflatten(2, query.shape[2:4]), state


def _causal(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    state: LinearState,
) -> tuple[Tensor, LinearState]:
    def chunk(
        state: LinearState, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        partial, state = causal_chunk(call, state, query, key, value, mask)
        return call.output(partial).unflatten(2, query.shape[2:4]), state

    outputs = [_no_rows(call, query, value)]
    for tile in tiles(key.shape[2], CAUSAL_CHUNK):
        mask = None if key_mask is None else key_mask[:, tile]
        tensors = (query[:, :, :, tile], key[:, :, tile], value[:, :, tile], mask)
        out, state = recomputed(chunk, state, *tensors)
        outputs.append(out)
    return torch.cat(outputs, dim=3), state


def _windowed(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    is_causal: bool,
    window_size: int,
    state: LinearState,
) -> tuple[Tensor, LinearState]:
    length = query.shape[3]
    if length == 0:
        return _no_rows(call, query, value), state
    recent = state.recent or RecentKeys.empty(key, value, window_size)
    keys, values, visible = with_recent(recent, key, value, key_mask)
    far, sums = _far_field(call, query, keys, values, visible, replace(state, recent=None))
    near = _near_field(call, query, keys, values, visible, is_causal, window_size)
    partial = far.merge(near)
    if is_causal:
        state = replace(sums, recent=last_keys(keys, values, visible, recent))
    else:
        features = call.phi.key_features(call.scaled(keys[:, :, length:]))
        last_values = values[:, :, length:].to(call.dtype)
        whole = absorb(sums, features, last_values, visible[:, length:])
        # The same from the other end: what is far before i there is far after i here.
        reversed_mask = None if key_mask is None else key_mask.flip(1)
        keys, values, visible = with_recent(recent, key.flip(2), value.flip(2), reversed_mask)
        later, _ = _far_field(call, query.flip(3), keys, values, visible, state)
        partial = partial.merge(Partial(*(part.flip(3) for part in later)))
        state = whole
    return call.output(partial), state


def _far_field(
    call: Call,
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads longer dim"],
    value: Float[Tensor, "batch key_heads longer value_dim"],
    visible: Bool[Tensor, "batch longer"],
    state: LinearState,
) -> tuple[Partial, LinearState]:
    """What queries get from keys at least a window before them. The keys start a window earlier."""

    def chunk(
        state: LinearState, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> tuple[Partial, LinearState]:
        partial, state = causal_chunk(call, state, query, key, value, mask)
        return _unflattened(partial, query), state

    partials = []
    for tile in tiles(query.shape[3], CAUSAL_CHUNK):
        tensors = (query[:, :, :, tile], key[:, :, tile], value[:, :, tile], visible[:, tile])
        partial, state = recomputed(chunk, state, *tensors)
        partials.append(partial)
    return _joined(partials), state


def _near_field(
    call: Call,
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads longer dim"],
    value: Float[Tensor, "batch key_heads longer value_dim"],
    visible: Bool[Tensor, "batch longer"],
    is_causal: bool,
    window_size: int,
) -> Partial:
    """What queries get from keys less than a window away. The keys start a window earlier."""

    def rows(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, near: Tensor) -> Partial:
        return _unflattened(band(call, query, key, value, mask, near), query)

    position = torch.arange(key.shape[2], device=key.device) - window_size
    partials = []
    for tile in tiles(query.shape[3], CAUSAL_CHUNK):
        stop = tile.stop + window_size if is_causal else tile.stop + 2 * window_size
        span = slice(tile.start, stop)
        distance = torch.arange(tile.start, tile.stop, device=key.device)[:, None] - position[span]
        near = distance.abs() < window_size
        if is_causal:
            near = near & (distance >= 0)
        tensors = (query[:, :, :, tile], key[:, :, span], value[:, :, span], visible[:, span])
        partials.append(recomputed(rows, *tensors, near))
    return _joined(partials)


def _no_rows(
    call: Call, query: Float[Tensor, "*batch length dim"], value: Tensor
) -> Float[Tensor, "*batch 0 value_dim"]:
    """The output of no queries, which a backward pass may still start from."""
    return query[..., :0, :1].to(call.dtype).expand(*query.shape[:-2], 0, value.shape[-1])


def _unflattened(partial: Partial, query: Tensor) -> Partial:
    return Partial(*(part.unflatten(2, query.shape[2:4]) for part in partial))


def _joined(partials: list[Partial]) -> Partial:
    return Partial(*(torch.cat(parts, dim=3) for parts in zip(*partials, strict=True)))
