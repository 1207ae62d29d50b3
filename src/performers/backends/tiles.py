"""What the chunked path does with one tile: attend within a causal chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from performers.backends import plain
from performers.backends.call import Call
from performers.backends.derivatives import is_transformed, needs_formula
from performers.backends.graphs import tiles
from performers.backends.reference import (
    Partial,
    absorb,
    key_exponent,
    key_weights,
    read_weights,
)
from performers.state import LinearState
from performers.typing import Features

__all__ = [
    "MAX_RISE",
    "absorb_one",
    "causal_chunk",
    "exponent_at",
    "key_tiles",
    "recomputed",
    "rows_below",
    "rows_of_a_piece",
]

# How far an exponent may rise above the frame. exp(60) = 1e26 leaves float32 room for sums over a
# chunk. The weights of the queries underflow below exp(−87), so the largest term that can get lost
# is exp(60 − 87) of a sum, which is far below rounding.
MAX_RISE = 60.0

# The size of the keys that go through a backend at a time. On a CPU new memory costs more than
# arithmetic: the allocator reuses tensors of this size for the next piece, but returns larger ones
# to the system.
PIECE_BYTES = 8 * 2**20


def causal_chunk(
    call: Call,
    state: LinearState,
    query: Float[Tensor, "batch key_heads group chunk dim"],
    key: Float[Tensor, "batch key_heads chunk dim"],
    value: Float[Tensor, "batch key_heads chunk value_dim"],
    key_mask: Bool[Tensor, "batch chunk"] | None,
) -> tuple[Partial, LinearState]:
    """What a chunk's queries get from the state and from the chunk's keys up to each, and the state
    that has absorbed the chunk. Rows of the result: [batch, key_heads, group · chunk, ·].

    Q′K′ᵀ is one matrix product, which needs one frame per feature for all rows: the exponent that
    is subtracted before exp is taken, like the running maximum of an online softmax. A maximum over
    the whole chunk would be a frame in which a large later key pushes an earlier row's keys to 0,
    and would leak the future through rounding. So the frame is the maximum of the state's frame and
    the exponent of the first key. With it, the rows before the first key that rises more than
    MAX_RISE above it are finished. A further pass, whose frame has absorbed these rows, starts at
    that key. Keys of similar norms need one pass, and every head has passes of its own.
    """
    group, length = query.shape[2:4]
    query_features = call.phi.query_features(call.scaled(query.flatten(2, 3)))
    key_features = call.phi.key_features(call.scaled(key))
    if needs_formula():  # whose passes cannot depend on the data
        features = query_features, key_features
        return plain.causal(state, *features, value.to(call.dtype), key_mask, group)
    value_one = F.pad(value.to(call.dtype), (0, 1), value=1.0)  # [V 1]: both sums in one product
    exponent = key_exponent(key_features, key_mask)
    has_exponents = key_features.log_values is not None or key_features.log_rows is not None
    position = torch.arange(length, device=key.device)
    later = (position[:, None] < position).repeat(group, 1)  # [group * chunk, chunk]
    start = position.new_zeros(key.shape[:2])  # [batch, key_heads]: the first unfinished row
    inside = None  # [batch, key_heads, chunk]: the keys and rows of this pass, None for all
    partial = None
    while True:
        largest = exponent.detach().amax(dim=2)
        # Without exponents every real key weighs the same, also where the first is masked.
        first = exponent_at(start, exponent.detach()) if has_exponents else largest
        state = state.rescaled(torch.maximum(state.log_scale, first))
        frame = state.log_scale.unsqueeze(2)  # [batch, key_heads, 1, num_features]
        is_last = True
        if has_exponents:
            limit = frame[..., : exponent.shape[-1]] + MAX_RISE
            is_last = not bool((largest.unsqueeze(2) > limit).any())
            if not is_last or inside is not None:
                inside, start = rows_below(limit, exponent.detach(), start)
                is_last = bool((start == length).all())

        seen = exponent
        if inside is not None:
            seen = exponent.masked_fill(~inside[..., None], -torch.inf)
            largest = seen.detach().amax(dim=2)
        key_side = key_weights(seen, frame, key_features)
        query_side, row_frame = read_weights(frame, query_features)
        # Keys after a row have finite weights in its frame, so masking the product is safe.
        scores = (query_side @ key_side.mT).masked_fill(later, 0.0)
        sums = torch.cat([state.values, state.normalizer.unsqueeze(-1)], dim=-1)
        both = scores @ value_one + query_side @ sums
        rows = Partial(both[..., :-1], both[..., -1:], row_frame)
        if partial is not None and inside is not None:
            finished = inside.repeat(1, 1, group)[..., None]
            pairs = zip(rows, partial, strict=True)
            rows = Partial(*(torch.where(finished, new, old) for new, old in pairs))
        partial = rows

        sums = sums + key_side.mT @ value_one
        # The sums are in the frame of this pass; rescaling brings them to the largest exponent so
        # far.
        absorbed = replace(state, values=sums[..., :-1], normalizer=sums[..., -1])
        state = absorbed.rescaled(torch.maximum(state.log_scale, largest))
        if is_last:
            return partial, state


def absorb_one(
    state: LinearState,
    features: Features,
    value: Float[Tensor, "batch key_heads 1 value_dim"],
    key_mask: Bool[Tensor, "batch 1"] | None,
) -> LinearState:
    """`absorb` for a single key, the step of decoding, which touches the state only once."""
    if is_transformed():  # which cannot write into a state that all examples share
        return absorb(state, features, value, key_mask)
    exponent = key_exponent(features, key_mask)
    log_scale = torch.maximum(state.log_scale, exponent.detach().squeeze(2))
    weights = key_weights(exponent, log_scale.unsqueeze(2), features)
    state = state.rescaled(log_scale)  # new tensors, so they can be added to
    state.normalizer.add_(weights.squeeze(2))
    state.values.addcmul_(weights.mT, value)
    return state


def exponent_at(
    start: Int[Tensor, "*heads"], exponent: Float[Tensor, "*heads chunk width"]
) -> Float[Tensor, "*heads width"]:
    """The exponent of the key at `start`, which the row at `start` surely sees.

    It is −∞ for a head that has finished the chunk (start = chunk), which therefore keeps its
    frame.
    """
    finished = start == exponent.shape[-2]
    index = start.masked_fill(finished, 0)[..., None, None]
    index = index.expand(*start.shape, 1, exponent.shape[-1])
    return exponent.gather(-2, index).squeeze(-2).masked_fill(finished[..., None], -torch.inf)


def rows_below(
    limit: Float[Tensor, "*heads 1 width"],
    exponent: Float[Tensor, "*heads chunk width"],
    start: Int[Tensor, "*heads"],
) -> tuple[Bool[Tensor, "*heads chunk"], Int[Tensor, "*heads"]]:
    """The keys from `start` to the first above the limit, and where that one is: chunk if none."""
    length = exponent.shape[-2]
    position = torch.arange(length, device=exponent.device)
    waiting = position >= start[..., None]
    # One feature that rises is enough.
    rises = (exponent > limit).any(dim=-1) & waiting
    stop = torch.where(rises, position, length).amin(dim=-1)
    return waiting & (position < stop[..., None]), stop


def rows_of_a_piece(key: Float[Tensor, "batch key_heads length dim"], dtype: torch.dtype) -> int:
    """How many positions of a long sequence go through a backend at a time."""
    row_bytes = dtype.itemsize * key[:, :, 0].numel()
    return max(1, PIECE_BYTES // max(1, row_bytes))


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; the backward pass computes its intermediate results again.

    Transforms of `torch.func`, which have no hooks on saved tensors, keep them, and ONNX has no
    backward pass.
    """
    if not torch.is_grad_enabled() or needs_formula():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def key_tiles(
    size: int, key: Tensor, value: Tensor, key_mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Tiles of keys, values and mask."""
    keys = tiles(size, key, dim=2)
    masks = [None] * len(keys) if key_mask is None else tiles(size, key_mask, dim=1)
    return zip(keys, tiles(size, value, dim=2), masks, strict=True)
