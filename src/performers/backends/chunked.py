"""The general path: the reference's sums, a tile of keys or queries at a time.

Features exist for one tile only: the backward pass computes them again, so training keeps the
inputs, the outputs and one state per tile, never anything of size length · num_features.

Bidirectional: tiles of keys are absorbed into one state, tiles of queries read it.
Causal: a chunk reads the state before it, attends within itself, and is absorbed:

        state ──►┌───────┐──►┌───────┐──►┌───────┐──► state
                 │chunk 1│   │chunk 2│   │chunk 3│          out = D⁻¹ (Q′ S + tril(Q′ K′ᵀ) V)
                 └───────┘   └───────┘   └───────┘

With a near field: see `near`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends import kernel_tiles
from performers.backends.call import Call
from performers.backends.graphs import tiles
from performers.backends.near import attend as attend_near
from performers.backends.reference import Partial, absorb, read
from performers.backends.scan import scan
from performers.backends.tiles import (
    absorb_one,
    causal_chunk,
    key_tiles,
    recomputed,
    rows_of_a_piece,
)
from performers.state import LinearState
from performers.typing import elementwise, is_log_linear

__all__ = ["attend"]

KEY_TILE = 512
QUERY_TILE = 512
CAUSAL_CHUNK = 128


def attend(
    call: Call,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention and the state after it, equal to the reference up to rounding."""
    if call.near is not None:
        return attend_near(call, query, key, value, key_mask, state)
    if query.shape[3] == 0 and call.is_causal:
        return _no_rows(call, query, value), state
    form = elementwise(call.phi)
    if form is not None and not (call.is_causal and query.shape[3] == 1):
        return kernel_tiles.attend(call, form, query, key, value, key_mask, state)
    if torch.compiler.is_compiling():
        # Floats that φ reads become inputs of a dynamic graph where it first reads them, and are
        # lost to the other tiles if that is within one that the backward pass computes again.
        call.phi.query_features(call.scaled(query[..., :0, :]))
        call.phi.key_features(call.scaled(key[..., :0, :]))
    if call.is_causal:
        rows = max(CAUSAL_CHUNK, rows_of_a_piece(key, call.dtype))
        if torch.compiler.is_exporting() or query.shape[3] <= rows:
            partial, state = _causal(call, query, key, value, key_mask, state)
            return partial.output(call), state
        outputs = []
        pieces = key_tiles(rows, key, value, key_mask)
        for queries, piece in zip(query.split(rows, dim=3), pieces, strict=True):
            partial, state = _causal(call, queries, *piece, state)
            outputs.append(partial.output(call))
        return torch.cat(outputs, dim=3), state
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
        return read(state, call.phi.query_features(call.scaled(rows))).output(call)

    for tile in key_tiles(KEY_TILE, key, value, key_mask):
        state = recomputed(absorb_tile, state, *tile)
    rows = tiles(QUERY_TILE, query.flatten(2, 3), dim=2)
    outputs = [recomputed(read_tile, state, tile) for tile in rows]
    return torch.cat(outputs, dim=2).unflatten(2, query.shape[2:4]), state


def _causal(
    call: Call,
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_mask: Bool[Tensor, "batch length"] | None,
    state: LinearState,
) -> tuple[Partial, LinearState]:
    """What queries get from the state and the keys up to their own, and the state after them."""
    phi = call.phi
    if query.shape[3] == 1:
        features = phi.key_features(call.scaled(key))
        state = absorb_one(state, features, value.to(call.dtype), key_mask)
        partial = read(state, phi.query_features(call.scaled(query.flatten(2, 3))))
        return _unflattened(partial, query), state
    if is_log_linear(phi):
        queries = phi.query_side(call.dtype).log_linear(call.scaled(query.flatten(2, 3)))
        keys = phi.key_side(call.dtype).log_linear(call.scaled(key))
        return scan(queries, keys, value.to(call.dtype), key_mask, state)

    def chunk(
        state: LinearState, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Partial, LinearState]:
        partial, state = causal_chunk(call, state, query, key, value, mask)
        return _unflattened(partial, query), state

    partials = []
    query_tiles = tiles(CAUSAL_CHUNK, query, dim=3)
    for rows, tile in zip(query_tiles, key_tiles(CAUSAL_CHUNK, key, value, key_mask), strict=True):
        partial, state = recomputed(chunk, state, rows, *tile)
        partials.append(partial)
    return _joined(partials), state


def _no_rows(
    call: Call, query: Float[Tensor, "*batch length dim"], value: Tensor
) -> Float[Tensor, "*batch 0 value_dim"]:
    """An output without rows, connected to the inputs so that a backward pass can start from it."""
    return query[..., :0, :1].to(call.dtype).expand(*query.shape[:-2], 0, value.shape[-1])


def _unflattened(partial: Partial, query: Tensor) -> Partial:
    return Partial(*(part.unflatten(2, query.shape[2:4]) for part in partial))


def _joined(partials: list[Partial]) -> Partial:
    return Partial(*(torch.cat(parts, dim=3) for parts in zip(*partials, strict=True)))
