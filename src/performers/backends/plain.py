"""Causal attention in plain PyTorch: one formula for all data, which any derivative can go through.

A chunk reads the state before it, and attends within itself pair by pair:

    A_ij = Σ_m e^(a_im + b_jm − c_i)      c_i = max_(j ≤ i, m) (a_im + b_jm)

No frame is shared by rows, so nothing depends on how large exponents are: no passes, as in `scan`
and `tiles.causal_chunk`, whose number no transform of `torch.func` could find out. The price is an
exponential for each pair and feature.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.graphs import folded
from performers.backends.reference import Partial, absorb, read
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
    group: int,
) -> tuple[Partial, LinearState]:
    """What each query gets from the state and the keys up to its own, and the state after them.

    Rows of `queries` and of the result are [group · length].

    Cost: O(length · (CHUNK + value_dim) · num_features) time and memory.
    """
    length = value.shape[2]
    if key_mask is not None:
        keys = keys._replace(log_rows=_hidden(keys, key_mask))

    def chunks(x: Tensor, beyond: float) -> Float[Tensor, "chunks *batch chunk _"]:
        """Rows [length] as whole chunks, with a number beyond the last."""
        x = F.pad(x, (0, 0, 0, -length % CHUNK), value=beyond)
        return x.unflatten(-2, (-1, CHUNK)).movedim(-3, 0)

    of_queries = [
        None if x is None else chunks(x.unflatten(2, (group, length)), 0.0).flatten(3, 4)
        for x in queries
    ]
    # Keys beyond the last weigh 0: by an exponent of −∞, or by values where there is none.
    of_keys = [
        None if x is None else chunks(x, beyond)
        for x, beyond in zip(keys, (0.0, -torch.inf, -torch.inf), strict=True)
    ]
    parts = [*of_queries, *of_keys, chunks(value, 0.0)]
    places = [place for place, part in enumerate(parts) if part is not None]

    def step(carry: list[Tensor], chunk: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = dict(zip(places, chunk, strict=True))
        *of_features, value = [given.get(place) for place in range(7)]
        assert value is not None, "the values are the last part"
        queries, keys = Features(*of_features[:3]), Features(*of_features[3:])
        log_scale, normalizer, values = carry
        before = LinearState(log_scale, normalizer, values)
        partial = read(before, queries).merge(_pairs(queries, keys, value, group))
        after = absorb(before, keys, value, None)
        return [after.log_scale, after.normalizer, after.values], [*partial]

    carry, outputs = folded(
        step,
        [state.log_scale, state.normalizer, state.values],
        [part for part in parts if part is not None],
    )
    rows = [
        x.unflatten(3, (group, CHUNK)).movedim(0, 3).flatten(3, 4)[:, :, :, :length].flatten(2, 3)
        for x in outputs
    ]
    log_scale, normalizer, values = carry
    after = replace(state, log_scale=log_scale, normalizer=normalizer, values=values)
    return Partial(*rows), after


def state_of_heads(
    log_scale: Float[Tensor, "heads num_features"],
    normalizer: Float[Tensor, "heads num_features"],
    values: Float[Tensor, "heads num_features value_dim"],
) -> LinearState:
    """A state of what operators have, each head as a sequence with one key head."""
    return LinearState(log_scale.unsqueeze(1), normalizer.unsqueeze(1), values.unsqueeze(1))


def _hidden(
    keys: Features, key_mask: Bool[Tensor, "batch length"]
) -> Float[Tensor, "batch key_heads length 1"]:
    """The `log_rows` of keys, −∞ for masked ones."""
    rows = keys.log_rows
    if rows is None:
        like = keys.log_values if keys.values is None else keys.values
        assert like is not None, "Features must have at least one part"
        rows = like.new_zeros(*like.shape[:-1], 1)
    return rows.masked_fill(~key_mask[:, None, :, None], -torch.inf)


def _pairs(
    queries: Features,
    keys: Features,
    value: Float[Tensor, "batch key_heads chunk value_dim"],
    group: int,
) -> Partial:
    """What the queries of a chunk get from its keys up to their own."""
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu(1)
    later = later.repeat(group, 1)
    exponent = keys.exponent().unsqueeze(2)
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
