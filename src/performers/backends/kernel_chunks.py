"""Causal attention with features f(ω·x) + ε: tiles of chunks, all chunks of a tile at once.

With K and Q the features F of a chunk, c = 1/√columns and G as in `kernel_tiles`, S what is before
the chunk and T what comes after it:

    S ← S + c Kᵀ [V 1]      out = c D⁻¹ (Q S + P V)        P = c tril(Q Kᵀ)
    T ← T + Qᵀ G             dQ = G Sᵀ + R K               R = c tril(G [V 1]ᵀ)
                             dK = c [V 1] Tᵀ + Rᵀ Q        d[V 1] = c K T + Pᵀ G

Only sums go from chunk to chunk; all else is one product for all chunks of a tile. The forward pass
keeps S before each tile, so that backward is a single sweep from the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.buffers import (
    KEPT_BYTES,
    KEPT_IN_TRAINING,
    buffers,
    room_of_outputs,
    slices,
)
from performers.backends.kernel_maps import Map, columns, inverse, of_heads, tiles_of

__all__ = ["CHUNK", "Starts", "backward", "forward", "room_of_starts", "sizes"]

CHUNK = 64  # positions
# Of a tile of a long sequence. Fewer need more calls, and keep more states: with 1,024 features
# these are as large as the values.
CHUNKS = 16
# Of a tile of short sequences.
BLOCKS = 64
FEATURES = 2**18
HEADS = 64  # at once, on other devices than a CPU


class Starts(NamedTuple):
    """S before tiles, in two parts, that of 1 and that of V: a product with 65 columns costs a
    fifth more than one with 64."""

    normalizer: Float[Tensor, "heads tiles num_features"]
    values: Float[Tensor, "heads tiles num_features value_dim"]


def sizes(length: int, num_features: int, device: torch.device) -> tuple[int, int]:
    """Heads at once, and chunks of a tile: of one head, or all chunks of several."""
    chunks = max(1, min(CHUNKS, -(-length // CHUNK)))
    rows = min(CHUNK * chunks, max(1, length))
    is_short = chunks < CHUNKS
    heads = min(BLOCKS // chunks, FEATURES // (rows * max(1, num_features))) if is_short else 1
    return max(1, heads) * (1 if device.type == "cpu" else HEADS), chunks


def room_of_starts(values: Float[Tensor, "heads num_features value_dim"], length: int) -> Starts:
    """New memory for those of all tiles of so many positions but the first, which has S before the
    keys."""
    whole = length // CHUNK
    # A chunk that is not whole is a tile of its own.
    count = -(-whole // CHUNKS) + (-(-length // CHUNK) - whole) - 1
    heads, *of_state = values.shape
    return Starts(
        values.new_empty(heads, count, of_state[0]), values.new_empty(heads, count, *of_state)
    )


def _tiles(
    x: Float[Tensor, "heads length _"], chunks: int
) -> list[Float[Tensor, "chunks heads size _"]]:
    """Views of x, each of so many chunks at most."""
    whole, rest = divmod(x.shape[1], CHUNK)
    tiles: list[Tensor] = []
    if whole:
        in_chunks = x[:, : whole * CHUNK].unflatten(1, (whole, CHUNK))
        tiles.extend(in_chunks.transpose(0, 1).split(chunks))
    if rest:
        tiles.append(x[:, whole * CHUNK :].unsqueeze(0))
    return tiles


def _key_tiles(
    chunks: int, *parts: Float[Tensor, "heads length _"] | None
) -> list[tuple[Any, ...]]:
    """What each tile has of them; None stays None."""
    return tiles_of(lambda x: _tiles(x, chunks), *parts)


def _query_tiles(
    chunks: int, *parts: Float[Tensor, "heads group length _"]
) -> list[list[tuple[Tensor, ...]]]:
    """The same for each query that shares keys."""
    members = zip(*(x.unbind(1) for x in parts), strict=True)
    return [list(tile) for tile in zip(*(_key_tiles(chunks, *x) for x in members), strict=True)]


def _blocks(tile: Float[Tensor, "chunks heads size _"]) -> Float[Tensor, "blocks size _"]:
    """For products: a view of one head, a copy of several."""
    return tile.flatten(0, 1)


class _Rows:
    """The features of a tile's queries or keys."""

    def __init__(
        self, name: str, phi: Map, tile: Tensor, present: Tensor | None, is_back: bool = False
    ) -> None:
        """`present`: 0 for rows that have no features, whatever they are. `is_back`: there is a way
        back, which needs projections."""
        self.phi, self.heads, blocks = phi, tile.shape[1], _blocks(tile)
        self.rows = blocks.flatten(0, 1).unsqueeze(0)
        self.present = None if present is None else _blocks(present).flatten(0, 1).unsqueeze(0)
        self.projected = phi.projected(name, self.rows)
        features = phi.features(self.projected, self.present, name if is_back else None)
        self.features = features.view(*blocks.shape[:2], -1)

    def back(self, gradient: Float[Tensor, "blocks size num_features"], of_tile: Tensor) -> None:
        """Write the gradient of the tile, of that of its features, which is lost."""
        gradient = gradient.view(self.projected.shape)
        if self.present is not None:
            gradient.mul_(self.present)
        if self.heads == 1:
            room = _blocks(of_tile).flatten(0, 1).unsqueeze(0)
            self.phi.backward(gradient, self.projected, self.rows, room)
        else:
            room = buffers.take("of rows", self.rows.shape, of_tile)
            self.phi.backward(gradient, self.projected, self.rows, room)
            of_tile.copy_(room.view(of_tile.shape))


class _Sums:
    """S of some heads before each chunk of a tile and after the last, or T after each and before
    the first."""

    def __init__(self, name: str, chunks: int, normalizer: Tensor, values: Tensor) -> None:
        """`chunks`: of the largest tile. The others have the shapes of one S."""
        self.of_ones = buffers.take(f"{name} of ones", (chunks + 1, *normalizer.shape), values)
        self.of_values = buffers.take(name, (chunks + 1, *values.shape), values)
        self.parts = self.of_values.unbind()

    def put(self, place: int, sums: tuple[Tensor, Tensor]) -> None:
        self.of_ones[place], self.of_values[place] = sums

    def take(self, place: int, room: tuple[Tensor, Tensor]) -> None:
        """Write those of a place to a room."""
        for there, sums in zip(room, (self.of_ones, self.of_values), strict=True):
            there.copy_(sums[place])

    def of(self, chunks: slice) -> tuple[Tensor, Tensor]:
        """As [blocks, 1, num_features] and [blocks, num_features, value_dim]."""
        of_ones = self.of_ones[chunks].flatten(0, 1).unsqueeze(1)
        return of_ones, self.of_values[chunks].flatten(0, 1)

    def absorb(self, features: Tensor, values: Tensor, factor: float) -> None:
        """After the first, S before each chunk and after the last of these."""
        chunks = len(features) // self.of_ones.shape[1]
        of_ones, of_values = self.of(slice(1, chunks + 1))
        torch.sum(features, dim=1, keepdim=True, out=of_ones).mul_(factor)
        of_values.baddbmm_(features.mT, values, beta=0, alpha=factor)
        self.of_ones[: chunks + 1].cumsum_(dim=0)
        _add_up(self.parts[: chunks + 1])

    def add_up_from_end(self, chunks: int) -> None:
        """Before the last, T, of what every chunk adds to it."""
        of_ones = self.of_ones[: chunks + 1]
        of_ones.copy_(of_ones.flip(0).cumsum_(dim=0).flip(0))
        _add_up(self.parts[chunks::-1])


def _add_up(parts: Sequence[Tensor]) -> None:
    """Add to each part those before it."""
    for before, part in itertools.pairwise(parts):
        part.add_(before)


def forward(
    phi: Map,
    query: Float[Tensor, "heads group length dim"],
    key: Float[Tensor, "heads length dim"],
    value: Float[Tensor, "heads length value_dim"],
    presence: Float[Tensor, "heads length 1"] | None,
    normalizer: Float[Tensor, "heads num_features"],
    values: Float[Tensor, "heads num_features value_dim"],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Starts]:
    """The output; for each row c / D, which it was multiplied by; S after all keys, in two parts;
    the starts of all tiles but the first."""
    out = room_of_outputs(query, value)
    rates = values.new_full((*query.shape[:3], 1), phi.factor)
    after = normalizer.clone(), values.clone()
    starts = room_of_starts(values, key.shape[1])
    at_once, most = sizes(key.shape[1], values.shape[1], key.device)
    for heads in slices(len(key), at_once):
        carry = after[0][heads], after[1][heads]
        sums = _Sums("sums", most, *carry)
        key_tiles = _key_tiles(most, key[heads], value[heads], of_heads(presence, heads))
        query_tiles = _query_tiles(most, query[heads], out[heads], rates[heads])
        for index, ((own_key, own_value, present), members) in enumerate(
            zip(key_tiles, query_tiles, strict=True)
        ):
            chunks = len(own_key)
            if index > 0:
                starts.normalizer[heads, index - 1], starts.values[heads, index - 1] = carry
            keys = _Rows("key", phi, own_key, present)
            rows = phi.wide("value", _blocks(own_value))
            sums.put(0, carry)
            sums.absorb(keys.features, rows, phi.factor)
            of_ones, of_values = sums.of(slice(chunks))
            for own_query, room, rate in members:
                queries = _Rows("query", phi, own_query, None)
                scores = phi.scores(queries.features, keys.features)
                found = buffers.product("found", queries.features, of_values)
                found.baddbmm_(scores, rows)
                # The vector on the left, where BLAS is fast.
                total = buffers.product("total", of_ones, queries.features.mT).mT
                total = total + scores.sum(dim=-1, keepdim=True)
                if normalize:
                    # `rates` begins as c: found · c is the numerator, total · c the normalizer.
                    inverses = inverse(total * phi.factor, phi.kernel.is_nonnegative)
                    rate.mul_(inverses.view(rate.shape))
                torch.mul(found.view(room.shape), rate, out=room)
            sums.take(chunks, carry)
    buffers.trim(KEPT_BYTES)
    return out, rates, *after, starts


def backward(
    phi: Map,
    out_gradient: Float[Tensor, "heads group length value_dim"],
    normalizer_gradient: Float[Tensor, "heads num_features"],
    values_gradient: Float[Tensor, "heads num_features value_dim"],
    query: Float[Tensor, "heads group length dim"],
    key: Float[Tensor, "heads length dim"],
    value: Float[Tensor, "heads length value_dim"],
    presence: Float[Tensor, "heads length 1"] | None,
    starts: Starts,
    out: Float[Tensor, "heads group length value_dim"],
    rates: Float[Tensor, "heads group length 1"],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of S before the keys, in two parts. `starts`: those of
    all tiles."""
    of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    before = normalizer_gradient.clone(), values_gradient.clone()
    (at_once, most), factor = sizes(key.shape[1], values_gradient.shape[1], key.device), phi.factor
    for heads in slices(len(key), at_once):
        carry = before[0][heads], before[1][heads]
        sums, later = (_Sums(name, most, *carry) for name in ("sums", "later sums"))
        key_tiles = _key_tiles(
            most, key[heads], value[heads], of_heads(presence, heads), of_key[heads],
            of_value[heads],
        )  # fmt: skip
        query_tiles = _query_tiles(
            most, query[heads], out_gradient[heads], out[heads], rates[heads], of_query[heads]
        )
        for index in reversed(range(len(key_tiles))):
            own_key, own_value, present, of_own_key, of_own_value = key_tiles[index]
            chunks = len(own_key)
            keys = _Rows("key", phi, own_key, present, is_back=True)
            rows = phi.wide("value", _blocks(own_value))
            sums.put(0, (starts.normalizer[heads, index], starts.values[heads, index]))
            known = (chunks - 1) * own_key.shape[1]
            sums.absorb(keys.features[:known], rows[:known], factor)
            of_ones, of_values = sums.of(slice(chunks))
            later.put(chunks, carry)
            own_ones, own_values = later.of(slice(chunks))
            keys_gradient = buffers.take("of keys", keys.features.shape, keys.features)
            rows_gradient = buffers.take("of values", rows.shape, rows)
            for number, member in enumerate(query_tiles[index]):
                own_query, own_of_out, own_out, rate, of_own_query = member
                beta = float(number > 0)  # the first writes, others add
                queries = _Rows("query", phi, own_query, None, is_back=True)
                gradient, along = map(_blocks, columns(own_of_out, own_out, rate, normalize))
                own_values.baddbmm_(queries.features.mT, gradient, beta=beta)
                own_ones.baddbmm_(along.mT, queries.features, beta=beta)
                of_scores = buffers.product("of scores", gradient, rows.mT, factor)
                of_scores.add_(along, alpha=factor).tril_()
                of_queries = buffers.product("of queries", gradient, of_values.mT)
                of_queries.addcmul_(along, of_ones).baddbmm_(of_scores, keys.features)
                queries.back(of_queries, of_own_query)
                keys_gradient.baddbmm_(of_scores.mT, queries.features, beta=beta)
                scores = phi.scores(queries.features, keys.features)
                rows_gradient.baddbmm_(scores.mT, gradient, beta=beta)
            later.add_up_from_end(chunks)
            after_ones, after_values = later.of(slice(1, chunks + 1))
            keys_gradient.baddbmm_(rows, after_values.mT, alpha=factor)
            keys_gradient.add_(after_ones, alpha=factor)
            rows_gradient.baddbmm_(keys.features, after_values, alpha=factor)
            keys.back(keys_gradient, of_own_key)
            of_own_value.copy_(rows_gradient.view(of_own_value.shape))
            later.take(0, carry)
    buffers.trim(KEPT_IN_TRAINING)
    return of_query, of_key, of_value, *before
