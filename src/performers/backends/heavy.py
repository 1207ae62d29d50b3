"""Heavy keys: far keys that stay exact, because near queries attended to them much.

While a key is near, its *weight* is the attention that queries pay it on average, of what they pay
to near keys and sinks. When its block becomes far, it competes with those that are far already: the
`num_heavy` heaviest stay, one set for each block of queries and each key head.

    far of block b     … b−3   b−2 │ near: b−1, b │                     causal
                       … b−3   b−2 │ near: b−1, b, b+1 │ b+2   b+3 …    bidirectional

A set is made of whole blocks, and a weight of queries of the key's own and the neighboring blocks,
so nothing that a causal query reads depends on a later token. A state keeps one set, and the sums
of weights of its near keys.

Source: Zhang et al. 2023, "H2O: heavy-hitter oracle" (keys kept by the attention they received).
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends.buffers import slices
from performers.backends.call import Call
from performers.backends.derivatives import is_traced
from performers.backends.fused_softmax import HIDDEN
from performers.backends.slots import Slots
from performers.state import NearKeys

TILE_BYTES = 2**21  # of scores of near keys, which live at once

__all__ = ["HeavyKeys", "Kept", "heavier", "heavy_keys"]


class Kept(NamedTuple):
    """Heavy keys, their values and weights, which are −∞ where there is no key."""

    key: Float[Tensor, "batch key_heads *blocks num_heavy dim"]
    value: Float[Tensor, "batch key_heads *blocks num_heavy value_dim"]
    weight: Float[Tensor, "batch key_heads *blocks num_heavy"]

    @classmethod
    def of(cls, near: NearKeys) -> Kept:
        """Those of a state."""
        return cls(near.heavy_key, near.heavy_value, near.heavy_weight)

    def with_block(
        self,
        key: Float[Tensor, "batch key_heads block dim"],
        value: Float[Tensor, "batch key_heads block value_dim"],
        sums: Float[Tensor, "batch key_heads two_blocks"],
        is_known: Bool[Tensor, "batch 1 block"],
    ) -> Kept:
        """The heaviest of these and of a block that all its near queries have seen."""
        size = key.shape[2]
        weight = sums[..., :size] / (2 * size - torch.arange(size, device=key.device))
        weight = weight.masked_fill(~is_known, -torch.inf)
        number = self.weight.shape[-1]
        places = torch.arange(number + size, device=key.device)
        own, of_block = (x.expand(*key.shape[:2], -1) for x in places.split([number, size]))
        weight, chosen = heavier((self.weight, own), (weight, of_block))
        one_key, one_value = (
            torch.cat(x, dim=2).take_along_dim(chosen.unsqueeze(-1), dim=2)
            for x in ((self.key, key), (self.value, value))
        )
        return Kept(one_key, one_value, weight)

    def where(self, there: Bool[Tensor, "batch 1 1"], other: Kept) -> Kept:
        """The other in some sequences of the batch."""
        there = there.unsqueeze(-1)
        return Kept(
            torch.where(there, other.key, self.key),
            torch.where(there, other.value, self.value),
            torch.where(there.squeeze(-1), other.weight, self.weight),
        )


class HeavyKeys(NamedTuple):
    """Those of every block of queries, those of the tokens to come, and the sums of weights of the
    keys that are near of them."""

    of_blocks: Kept
    later: Kept
    sums: Float[Tensor, "batch key_heads num_sums"]


def heavy_keys(call: Call, slots: Slots, earlier: NearKeys | None) -> HeavyKeys:
    """The heavy keys of slots, after those of a state."""
    near = call.near
    assert near is not None, "heavy keys are far keys beside a near field"
    size, number = near.window_size, near.num_heavy
    if not number:
        return _none(call, slots)
    slot_count = slots.key.shape[2]
    count = -(-slot_count // size)
    with torch.no_grad():  # a choice has no gradient; what is chosen has
        sums, seen = _received(call, slots, earlier)
        weights = sums / seen.clamp(min=1)
        estimated = slots.estimated()
        if estimated is not None:
            weights = weights.masked_fill(~estimated[:, None], -torch.inf)
        weights = F.pad(weights, (0, count * size - slot_count), value=-torch.inf)
        blocks = weights.unflatten(-1, (count, size)).unbind(2)
        places = torch.arange(number, number + count * size, device=sums.device)
        of_blocks = places.expand_as(weights).unflatten(-1, (count, size)).unbind(2)
        # Places count from the heavy keys of the state, which come before the slots.
        nothing = torch.full_like(weights[..., :1], -torch.inf).expand(-1, -1, number)
        first = nothing if earlier is None else earlier.heavy_weight.to(weights.dtype)
        of_first = torch.arange(number, device=sums.device).expand_as(first)
        pairs = [*zip(blocks, of_blocks, strict=True)]
        before = _running((first, of_first), pairs)
        chosen = [before[max(0, block - 1)] for block in range(count)]
        if not call.is_causal:
            after = _running((nothing, of_first), pairs[::-1])
            chosen = [
                heavier(one, after[max(0, count - 2 - block)]) for block, one in enumerate(chosen)
            ]
        # of each sequence, the blocks that are far of its next token
        done = ((slots.next_start() - slots.start) // size).clamp(min=0)[..., None, None]
        later = [
            torch.stack(x, dim=2).take_along_dim(done.expand(-1, 1, -1, number), dim=2).squeeze(2)
            for x in zip(*before, strict=True)
        ]
        position = slots.next_start() + torch.arange(2 * size, device=sums.device)
        kept_sums = slots.rows_at(position, sums.unsqueeze(-1)).squeeze(-1)
        weights, places = (torch.stack(x, dim=2) for x in zip(*chosen, strict=True))

    key, value = (F.pad(x, (0, 0, 0, count * size - slot_count)) for x in (slots.key, slots.value))
    if earlier is None:
        key, value = (F.pad(x, (0, 0, number, 0)) for x in (key, value))
    else:
        key = torch.cat([earlier.heavy_key.to(key.dtype), key], dim=2)
        value = torch.cat([earlier.heavy_value.to(value.dtype), value], dim=2)

    def kept(weights: Tensor, places: Tensor) -> Kept:
        def taken(x: Tensor) -> Tensor:
            found = x.take_along_dim(places.flatten(2).unsqueeze(-1), dim=2)
            return found.view(*places.shape, x.shape[-1])

        return Kept(taken(key), taken(value), weights)

    return HeavyKeys(kept(weights, places), kept(*later), kept_sums)


def _none(call: Call, slots: Slots) -> HeavyKeys:
    """No heavy keys at all."""
    heads, like = slots.key.shape[:2], slots.key.new_empty(0, dtype=call.dtype)

    def kept(*blocks: int) -> Kept:
        key, value = (
            x.new_empty(*heads, *blocks, 0, x.shape[-1]) for x in (slots.key, slots.value)
        )
        return Kept(key, value, like.new_empty(*heads, *blocks, 0))

    return HeavyKeys(kept(1), kept(), like.new_empty(*heads, 0))


Choice = tuple[Float[Tensor, "*batch _"], Int[Tensor, "*batch _"]]


def heavier(one: Choice, other: Choice) -> Choice:
    """The heaviest of both, as many as `one` has: their weights and places."""
    weights, places = (torch.cat(x, dim=-1) for x in zip(one, other, strict=True))
    weights, top = weights.topk(one[0].shape[-1], dim=-1)
    return weights, places.gather(-1, top)


def _running(first: Choice, blocks: list[Choice]) -> list[Choice]:
    """The heaviest of the first and of 0, 1, 2, … blocks."""
    return [*itertools.accumulate(blocks, heavier, initial=first)]


def _received(
    call: Call, slots: Slots, earlier: NearKeys | None
) -> tuple[Float[Tensor, "batch key_heads slots"], Int[Tensor, "#batch 1 slots"]]:
    """The sum of what near queries pay each key, and how many queries it is near of."""
    near, is_causal = call.near, call.is_causal
    assert near is not None, "weights are those of near queries"
    (batch, heads, slot_count, _), size = slots.key.shape, near.window_size
    group, count = slots.query.shape[2], -(-slot_count // size)
    rest, after = count * size - slot_count, 0 if is_causal else size
    position = slots.positions()
    is_real = (
        torch.ones_like(position, dtype=torch.bool) if slots.is_real is None else slots.is_real
    )
    is_new = is_real if earlier is None else is_real & (position >= earlier.count[:, None])
    is_new, position = (F.pad(x, (0, rest)).unflatten(1, (count, size)) for x in (is_new, position))
    # In base 2, because exp2 costs a CPU less than exp. Queries of a block side by side.
    query = call.scaled(F.pad(slots.query, (0, 0, 0, rest))) * math.log2(math.e)
    query = query.unflatten(3, (count, size)).transpose(2, 3).flatten(3, 4).flatten(0, 1)
    # What is near of each block is a view: rows that begin with a block of nothing.
    width = size * (2 if is_causal else 3)
    key = call.scaled(F.pad(slots.key, (0, 0, size, rest + after))).flatten(0, 1)
    sums = key.new_zeros(key.shape[:2])
    key = key.unfold(1, width, size)
    estimated = slots.estimated()
    is_hidden = ~F.pad(is_real if estimated is None else estimated, (size, rest + after))
    # The most that a score may be: a minimum hides one that is infinite, too.
    most = key.new_full(is_hidden.shape, torch.inf).masked_fill_(is_hidden, HIDDEN)
    most = most.unfold(1, width, size)
    later = torch.ones(size, size, dtype=torch.bool, device=key.device).triu_(1)
    later = F.pad(later, (size, 0)).repeat(group, 1)
    most_later = key.new_full(later.shape, torch.inf).masked_fill_(later, HIDDEN)
    # Hiding takes as long as a third of the scores, and few blocks have anything to hide.
    is_gappy = is_hidden.unfold(1, width, size).any(dim=-1)
    gaps = [[True] * count] * batch if is_traced() else is_gappy.tolist()
    sink_key, _, is_sink = slots.sinks(earlier)
    sink_key = call.scaled(sink_key).flatten(0, 1)
    place = position.repeat(1, 1, group).unsqueeze(-1)
    sink_place = torch.arange(near.num_sinks, device=key.device)
    no_sink = ~is_sink[:, None, None] | ((sink_place > place) & is_causal)
    tile = max(1, TILE_BYTES // (group * size * width * key.element_size()))
    # After a state, the block before the next token's own has no new query.
    first = 0 if earlier is None else 1
    for head, blocks in itertools.product(range(batch * heads), slices(count, tile, first)):
        of_batch, rows = head // heads, query[head, blocks]
        logits = torch.bmm(rows, key[head, blocks])
        if is_causal:
            logits.clamp_(max=most_later)
        if any(gaps[of_batch][blocks]):
            logits.clamp_(max=most[of_batch, blocks].unsqueeze(1))
        of_sinks = rows @ sink_key[head].mT
        of_sinks = of_sinks.masked_fill_(no_sink[of_batch, blocks], HIDDEN)
        largest = torch.cat([logits.amax(dim=-1, keepdim=True), of_sinks], dim=-1)
        largest = largest.amax(dim=-1, keepdim=True)
        weights = logits.sub_(largest).exp2_()
        total = weights.sum(dim=-1) + of_sinks.sub_(largest).exp2_().sum(dim=-1)
        # Only what each key gets is needed: no row is divided by its sum on its own.
        share = is_new[of_batch, blocks].repeat(1, group) / total
        paid = (share.unsqueeze(1) @ weights).squeeze(1)
        for number, part in enumerate(paid.split(size, dim=-1)):
            there = slice((blocks.start + number) * size, (blocks.stop + number) * size)
            sums[head, there] += part.flatten()
    sums = sums[:, size : size + slot_count].unflatten(0, (batch, heads))
    if earlier is not None:
        sums = sums + F.pad(earlier.heavy_sums, (0, slot_count - 2 * size))
    if is_causal:  # when they are far, the queries of both blocks have come
        seen = 2 * size - torch.arange(slot_count, device=key.device) % size
        return sums, seen[None, None]
    of_blocks = F.pad(is_new.sum(dim=-1), (1, 1)).unfold(1, 3, 1).sum(dim=-1)
    return sums, of_blocks.repeat_interleave(size, dim=1)[:, None, :slot_count]
