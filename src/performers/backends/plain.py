"""Causal attention in plain PyTorch: one formula for all data, which any derivative can go through.

A chunk reads the state before it, and attends within itself pair by pair:

    A_ij = Σ_m e^(a_im + b_jm − c_i)      c_i = max_(j ≤ i, m) (a_im + b_jm)

No frame is shared by rows, so nothing depends on how large exponents are: no passes, as in `scan`
and `tiles.causal_chunk`, whose number no transform of `torch.func` could find out. The price is an
exponential for each pair and feature.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.reference import Partial, absorb, key_exponent, read
from performers.state import LinearState, exp_difference
from performers.typing import Features

__all__ = ["causal", "state_of_heads"]

CHUNK = 16


def causal(
    state: LinearState,
    queries: Features,
    keys: Features,
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_mask: Bool[Tensor, "batch length"] | None,
) -> tuple[Partial, LinearState]:
    """What each query gets from the state and the keys up to its own, and the state after them.

    Rows of `queries` and of the result are [group · length].

    Cost: O(length · (CHUNK + value_dim) · num_features) time and memory.
    """
    length = value.shape[2]
    masks = [None] * len(range(0, length, CHUNK))
    if key_mask is not None:
        masks = key_mask.split(CHUNK, dim=1)
    partials = []
    for own_queries, own_keys, own_value, mask in zip(
        _chunks(queries, length), _chunks(keys, length), value.split(CHUNK, dim=2), masks,
        strict=True,
    ):  # fmt: skip
        own = _pairs(own_queries, own_keys, own_value, mask)
        partial = read(state, own_queries).merge(own)
        partials.append([part.unflatten(2, (-1, own_value.shape[2])) for part in partial])
        state = absorb(state, own_keys, own_value, mask)
    joined = (torch.cat(parts, dim=3).flatten(2, 3) for parts in zip(*partials, strict=True))
    return Partial(*joined), state


def state_of_heads(
    log_scale: Float[Tensor, "heads num_features"],
    normalizer: Float[Tensor, "heads num_features"],
    values: Float[Tensor, "heads num_features value_dim"],
) -> LinearState:
    """A state of what operators have, each head as a sequence with one key head."""
    return LinearState(log_scale.unsqueeze(1), normalizer.unsqueeze(1), values.unsqueeze(1))


def _chunks(features: Features, length: int) -> list[Features]:
    """Of rows [group · length] those of each chunk, [group · chunk]."""
    count = len(range(0, length, CHUNK))
    parts = [
        [None] * count
        if part is None
        else [x.flatten(2, 3) for x in part.unflatten(2, (-1, length)).split(CHUNK, dim=3)]
        for part in features
    ]
    return [Features(*chunk) for chunk in zip(*parts, strict=True)]


def _pairs(
    queries: Features,
    keys: Features,
    value: Float[Tensor, "batch key_heads chunk value_dim"],
    key_mask: Bool[Tensor, "batch chunk"] | None,
) -> Partial:
    """What the queries of a chunk get from its keys up to their own."""
    chunk, like = value.shape[2], next(part for part in queries if part is not None)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).triu(1)
    later = later.repeat(like.shape[2] // chunk, 1)
    exponent = key_exponent(keys, key_mask).unsqueeze(2)
    if queries.log_values is not None:
        exponent = exponent + queries.log_values.unsqueeze(3)
    # [batch, key_heads, group · chunk, chunk, num_features, or 1 where a key shares one exponent]
    exponent = exponent.masked_fill(later.unsqueeze(-1), -torch.inf)
    frame = exponent.detach().amax(dim=(3, 4)).unsqueeze(-1)
    weights = exp_difference(exponent, frame.unsqueeze(-1))
    of_queries, of_keys = queries.values, keys.values
    if weights.shape[-1] == 1 and of_queries is not None and of_keys is not None:
        scores = weights.squeeze(-1) * (of_queries @ of_keys.mT)
    else:
        if of_queries is not None:
            weights = weights * of_queries.unsqueeze(3)
        if of_keys is not None:
            weights = weights * of_keys.unsqueeze(2)
        scores = weights.sum(dim=-1)
    if queries.log_rows is not None:
        frame = frame + queries.log_rows
    return Partial(scores @ value, scores.sum(dim=-1, keepdim=True), frame)
