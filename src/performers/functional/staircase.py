"""Masks between causal and bidirectional: each query sees the first so many keys.

    a prefix, then causal        chunks                 chunks of another sequence

    ■ ■ ■ · · ·                  ■ ■ · · · ·            ■ ■ · · · · · ·
    ■ ■ ■ · · ·                  ■ ■ · · · ·            ■ ■ ■ ■ · · · ·
    ■ ■ ■ · · ·                  ■ ■ ■ ■ · ·            ■ ■ ■ ■ ■ ■ · ·
    ■ ■ ■ ■ · ·                  ■ ■ ■ ■ · ·            ■ ■ ■ ■ ■ ■ ■ ■
    ■ ■ ■ ■ ■ ·                  ■ ■ ■ ■ ■ ■
    ■ ■ ■ ■ ■ ■                  ■ ■ ■ ■ ■ ■

A prefix takes two calls: causal attention of all, and bidirectional attention of the prefix, whose
rows are taken from it. In general queries and keys are put into one sequence, each query after the
last key that it sees, and causal attention does the rest:

    keys      k0 k1 ·  k2 k3 ·  k4 k5 ·          the first query after a key shares its place
    queries   ·  q0 q1 ·  q2 q3 ·  q4 q5         · is padding
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.checks import check_tensor

__all__ = ["Order", "check_staircase", "prefix_seen", "with_prefix"]


class Order(NamedTuple):
    """Queries and keys in one sequence, in which causality says what `seen_lengths` did."""

    query_place: Int[Tensor, "batch query_length"]
    key_place: Int[Tensor, "batch key_length"]
    length: int

    @classmethod
    def of(cls, seen_lengths: Int[Tensor, "batch query_length"], key_length: int) -> Order:
        """The shortest such sequence; while compiling, the longest that one could take."""
        seen, order = seen_lengths.long().sort(dim=1, stable=True)
        # A query shares the place of its last key, unless one before it does, or it sees no key.
        is_alone = (seen == F.pad(seen, (1, 0))[:, :-1]).long()
        number = F.pad(is_alone.cumsum(dim=1), (1, 0))
        query_place = torch.empty_like(seen).scatter(1, order, seen - 1 + number[:, 1:])
        by_seen = seen.new_zeros(len(seen), key_length + 1).scatter_add(1, seen, is_alone)
        key_place = torch.arange(key_length, device=seen.device) + by_seen.cumsum(dim=1)[:, :-1]
        most = seen.shape[1]
        if not torch.compiler.is_compiling() and number.numel():
            most = int(number[:, -1].max())
        return cls(query_place, key_place, key_length + most)

    def laid_out(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        key_padding_mask: Bool[Tensor, "batch key_length"] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "batch length"]]:
        """Queries, keys, values and their mask in this order, 0 where there is none."""
        if key_padding_mask is None:
            key_padding_mask = torch.ones_like(self.key_place, dtype=torch.bool)
        empty = key_padding_mask.new_zeros(key_padding_mask.shape[0], self.length)
        return (
            self._rows(query, self.query_place),
            self._rows(key, self.key_place),
            self._rows(value, self.key_place),
            empty.scatter(1, self.key_place, key_padding_mask),
        )

    def of_queries(self, out: Float[Tensor, "batch heads length value_dim"]) -> Tensor:
        """The rows of the queries."""
        return out.gather(2, _expanded(self.query_place, out))

    def _rows(self, x: Tensor, place: Tensor) -> Tensor:
        empty = x.new_zeros(*x.shape[:2], self.length, x.shape[3])
        return empty.scatter(2, _expanded(place, x), x)


def _expanded(place: Tensor, x: Tensor) -> Tensor:
    return place[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def with_prefix(
    attend: Callable[..., Float[Tensor, "batch heads longest value_dim"]],
    prefix_lengths: Int[Tensor, " batch"],
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_padding_mask: Bool[Tensor, "batch length"] | None,
    out: Float[Tensor, "batch heads length value_dim"],
) -> Float[Tensor, "batch heads length value_dim"]:
    """Outputs of causal attention, those of each prefix replaced by what `attend`, bidirectional
    attention, finds for the prefix alone.
    """
    longest = key.shape[2]
    if not torch.compiler.is_compiling() and prefix_lengths.numel():
        longest = int(prefix_lengths.max())
    is_inside = torch.arange(longest, device=key.device) < prefix_lengths[:, None]
    seen = is_inside if key_padding_mask is None else is_inside & key_padding_mask[:, :longest]
    parts = (x[:, :, :longest] for x in (query, key, value))
    inside = attend(*parts, key_padding_mask=seen)
    inside = torch.where(is_inside[:, None, :, None], inside, out[:, :, :longest])
    return torch.cat([inside, out[:, :, longest:]], dim=2)


def prefix_seen(prefix_lengths: Int[Tensor, " batch"], length: int) -> Int[Tensor, "batch length"]:
    """The prefix, and all up to itself: how many keys each query sees."""
    own = torch.arange(1, length + 1, device=prefix_lengths.device)
    return torch.maximum(own, prefix_lengths[:, None])


def check_staircase(
    seen_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool,
    segment_ids: Tensor | None,
    window_size: int | None = None,
    has_state: bool = False,
) -> None:
    """Raise unless these lengths, where given, are of the keys that queries see, and nothing else
    says it too."""
    if seen_lengths is None and prefix_lengths is None:
        return
    batch = key.shape[0]
    if seen_lengths is not None and (is_causal or prefix_lengths is not None):
        raise ValueError(
            "seen_lengths says how many keys each query sees, and is_causal and prefix_lengths say "
            "it too: pass seen_lengths with is_causal=False alone, or the others without it."
        )
    if prefix_lengths is not None and not is_causal:
        raise ValueError(
            "prefix_lengths belongs to causal attention, whose first positions see each other: "
            "pass is_causal=True with it, or a key_padding_mask if nothing comes after the prefix."
        )
    if seen_lengths is not None and window_size is not None:
        raise ValueError(
            f"window_size={window_size} needs one query per key, for distances to mean something, "
            "and with seen_lengths a query belongs to no key. Pass window_size=None (convert with "
            "window_size=0), or if only the first positions see each other prefix_lengths."
        )
    if prefix_lengths is not None and has_state:
        raise ValueError(
            "a prefix begins a sequence, and initial_state continues one: pass prefix_lengths with "
            "the first part, which must hold the whole prefix, and None with what follows."
        )
    if segment_ids is not None:
        raise ValueError(
            "packed sequences have no prefixes and no lengths that are seen: segment_ids goes "
            "without prefix_lengths and seen_lengths. Give each sequence a row of its own."
        )
    shape = (batch, query.shape[2])
    _check_lengths("seen_lengths", seen_lengths, "(batch, query_length)", shape, key)
    _check_lengths("prefix_lengths", prefix_lengths, "(batch,)", (batch,), key)


def _check_lengths(
    name: str, lengths: Tensor | None, layout: str, shape: tuple[int, ...], key: Tensor
) -> None:
    """Numbers are looked at only where they can be: not while compiling, nor of a batch of vmap."""
    if lengths is None:
        return
    check_tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != shape:
        raise ValueError(
            f"{name} must be {layout} = {shape} of int32 or int64, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}."
        )
    if lengths.device != key.device:
        raise ValueError(
            f"{name} must be on the device of key: it is on {lengths.device}, key on {key.device}. "
            f"Move it with .to({str(key.device)!r})."
        )
    is_hidden = lengths.is_meta or torch._C._functorch.is_batchedtensor(lengths)
    if is_hidden or torch.compiler.is_compiling():
        return
    outside = lengths[(lengths < 0) | (lengths > key.shape[2])]
    if outside.numel():
        raise ValueError(
            f"{name} must be from 0 to the number of keys, {key.shape[2]}, got {int(outside[0])}."
        )
