"""The default path: the reference's sums, a tile of keys or queries at a time.

Features exist for one tile only: the backward pass computes them again, so training keeps the
inputs, the outputs and one state per tile, never anything of size length · num_features.

Bidirectional: tiles of keys are absorbed into one state, tiles of queries read it.
Causal: a chunk reads the state before it, attends within itself, and is absorbed:

        state ──►┌───────┐──►┌───────┐──►┌───────┐──► state
                 │chunk 1│   │chunk 2│   │chunk 3│          out = D⁻¹ (Q′ S + tril(Q′ K′ᵀ) V)
                 └───────┘   └───────┘   └───────┘

Within a chunk, Q′K′ᵀ is one matrix product, which needs one frame per feature for all rows. A frame
taken from the whole chunk would let a large later key push an earlier row's keys to 0, and would
leak the future through rounding. So the frame is that of the state joined with the chunk's first
key, and the rows up to the first key that rises more than MAX_RISE above it are finished; a further
pass, with a frame that has absorbed them, starts at that key. Keys of like norms need one pass, and
every head goes at its own pace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performers.backends.reference import (
    absorb,
    divide,
    key_exponent,
    read,
    read_weights,
    row_factor,
)
from performers.typing import FeatureMap, LinearState, exp_difference

__all__ = ["attend"]

KEY_TILE = 512
QUERY_TILE = 512
CAUSAL_CHUNK = 128

# exp(60) = 1e26 leaves float32 room for sums over a chunk, and exp(60 − 87), the smallest share
# that a feature can have before its partner underflows, is far below rounding.
MAX_RISE = 60.0


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
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention and the state after it, equal to the reference up to rounding."""
    arguments = (query, key, value, phi, root, key_mask, normalize, state)
    return _causal(*arguments) if is_causal else _bidirectional(*arguments)


def _bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    root: float,
    key_mask: Tensor | None,
    normalize: bool,
    state: LinearState,
) -> tuple[Tensor, LinearState]:
    dtype = state.values.dtype

    def absorb_tile(
        state: LinearState, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> LinearState:
        return absorb(state, phi.key_features(key.to(dtype) * root), value.to(dtype), mask)

    def read_tile(state: LinearState, query: Tensor) -> Tensor:
        features = phi.query_features(query.to(dtype) * root)
        return read(state, features, phi.is_nonnegative, normalize)

    for tile in _tiles(key.shape[2], KEY_TILE):
        mask = None if key_mask is None else key_mask[:, tile]
        state = _recomputed(absorb_tile, state, key[:, :, tile], value[:, :, tile], mask)
    rows = query.flatten(2, 3)
    outputs = [
        _recomputed(read_tile, state, rows[:, :, tile])
        for tile in _tiles(rows.shape[2], QUERY_TILE)
    ]
    if not outputs:
        return query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=dtype), state
    return torch.cat(outputs, dim=2).unflatten(2, query.shape[2:4]), state


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    root: float,
    key_mask: Tensor | None,
    normalize: bool,
    state: LinearState,
) -> tuple[Tensor, LinearState]:
    dtype = state.values.dtype

    def chunk(
        state: LinearState, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        scaled = (query.to(dtype) * root, key.to(dtype) * root)
        return _causal_chunk(state, *scaled, value.to(dtype), mask, phi, normalize)

    outputs = [query.new_zeros(*query.shape[:3], 0, value.shape[-1], dtype=dtype)]
    for tile in _tiles(key.shape[2], CAUSAL_CHUNK):
        mask = None if key_mask is None else key_mask[:, tile]
        out, state = _recomputed(
            chunk, state, query[:, :, :, tile], key[:, :, tile], value[:, :, tile], mask
        )
        outputs.append(out)
    return torch.cat(outputs, dim=3), state


def _causal_chunk(
    state: LinearState,
    query: Float[Tensor, "batch key_heads group chunk dim"],
    key: Float[Tensor, "batch key_heads chunk dim"],
    value: Float[Tensor, "batch key_heads chunk value_dim"],
    key_mask: Bool[Tensor, "batch chunk"] | None,
    phi: FeatureMap,
    normalize: bool,
) -> tuple[Float[Tensor, "batch key_heads group chunk value_dim"], LinearState]:
    group, length = query.shape[2:4]
    query_features = phi.query_features(query.flatten(2, 3))
    key_features = phi.key_features(key)
    exponent = key_exponent(key_features, key_mask)
    position = torch.arange(length, device=key.device)
    earlier = (position[:, None] >= position).repeat(group, 1)  # [group * chunk, chunk]
    start = position.new_zeros(key.shape[:2])  # [batch, key_heads]: the first unfinished row
    out = None
    while True:
        state = state.rescaled(_frame_at(start, state, exponent.detach()))
        frame = state.log_scale.unsqueeze(2)  # [batch, key_heads, 1, num_features]
        waiting = position >= start[..., None]  # [batch, key_heads, chunk]
        rises = (exponent.detach() > frame + MAX_RISE).any(dim=-1) & waiting
        stop = torch.where(rises, position, length).amin(dim=-1)
        inside = waiting & (position < stop[..., None])

        inside_exponent = exponent.masked_fill(~inside[..., None], -torch.inf)
        key_weights = exp_difference(inside_exponent, frame)
        if key_features.values is not None:
            key_weights = key_weights * key_features.values
        query_weights, row_frame = read_weights(frame, query_features)
        scores = (query_weights @ key_weights.mT).masked_fill(~earlier, 0.0)
        rows = scores @ value + query_weights @ state.values
        finished = inside.repeat(1, 1, group)[..., None]
        if normalize:
            normalizer = scores.sum(dim=-1, keepdim=True)
            normalizer = normalizer + query_weights @ state.normalizer.unsqueeze(-1)
            rows = divide(rows, normalizer, phi.is_nonnegative)
        else:
            row_frame = row_frame.masked_fill(~finished, -torch.inf)
            rows = rows * row_factor(row_frame, query_features)
        out = rows if out is None else torch.where(finished, rows, out)

        grown = LinearState(
            state.log_scale,
            state.normalizer + key_weights.sum(dim=2),
            state.values + key_weights.mT @ value,
        )
        largest = inside_exponent.detach().amax(dim=2)
        state = grown.rescaled(torch.maximum(state.log_scale, largest))
        if not rises.any():
            return out.unflatten(2, (group, length)), state
        start = stop


def _frame_at(
    start: Int[Tensor, "batch key_heads"],
    state: LinearState,
    exponent: Float[Tensor, "batch key_heads chunk width"],
) -> Float[Tensor, "batch key_heads num_features"]:
    """The frame of the state joined with the key at `start`, which the row at `start` surely sees.

    A head that has finished the chunk (start = chunk) keeps its frame.
    """
    finished = start == exponent.shape[2]
    index = start.masked_fill(finished, 0)[..., None, None].expand(-1, -1, 1, exponent.shape[-1])
    first = exponent.gather(2, index).squeeze(2).masked_fill(finished[..., None], -torch.inf)
    return torch.maximum(state.log_scale, first)


def _tiles(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose intermediate results the backward pass shall compute again."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
