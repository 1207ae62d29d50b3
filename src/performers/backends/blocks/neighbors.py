"""Exact attention to the keys of a block and of its neighbors, there and back, a tile at a time.

For large blocks on a CPU by PyTorch's own kernel of exact attention, which keeps no logits. Going
back it computes the weights again, from the log of the normalizer that it is given. That of a whole
row, with all that a query scores beside near keys, makes of them the weights that near keys have in
the row. For others, products of matrices are faster: their logits are columns of the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks.sizes import LOG2_E, Problem, Sizes
from performers.backends.buffers import buffers, slices
from performers.backends.fused_softmax import HIDDEN

__all__ = ["Near", "Neighbors"]

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

FEW = 8  # blocks, of which those at the ends are worth a call of their own


class Span(NamedTuple):
    """Blocks from `start` to `stop`, and which of the blocks near each: `first` to `until`."""

    start: int
    stop: int
    first: int
    until: int


class Near(NamedTuple):
    """What the queries of a tile find near them, and the log of the normalizers of it."""

    out: Float[Tensor, "blocks rows value_dim"]
    log_sum: Float[Tensor, "blocks rows 1"]


class Neighbors:
    """The near keys of some heads.

    `key` and `value` begin with a block of nothing, and end with one unless causal, so that what is
    near of each block are rows that follow each other. `hidden`: rows that no query sees, one row
    for all heads where all are alike.
    """

    def __init__(
        self,
        problem: Problem,
        sizes: Sizes,
        key: Float[Tensor, "heads rows dim"],
        value: Float[Tensor, "heads rows value_dim"],
        hidden: Bool[Tensor, "#heads rows"],
    ) -> None:
        self.sizes, self.scale, self.key, self.value = sizes, problem.scale, key, value
        # The most that a logit may be: a minimum hides one that is infinite, too.
        self.most = key.new_full(hidden.shape, torch.inf).masked_fill_(hidden, HIDDEN)
        later = torch.ones(sizes.block, sizes.block, dtype=torch.bool, device=key.device).triu_(1)
        later_most = key.new_full(later.shape, torch.inf).masked_fill_(later, HIDDEN)
        self.later = later_most if problem.is_causal else None
        # PyTorch's kernel adds, and would show it to the queries before it.
        self.is_fused = sizes.is_fused and bool(key.sum().isfinite())
        # Few blocks have a key near them that is not there.
        is_gappy = hidden.unfold(1, sizes.near, sizes.block).any(dim=-1).tolist()
        self.gappy = [[block for block, is_one in enumerate(row) if is_one] for row in is_gappy]
        self._last: tuple[tuple[int, Span], Tensor] | None = None

    def spans(self, tile: slice) -> Iterator[Span]:
        """The blocks of a tile, those apart that lack a neighbor if blocks are few."""
        if self.sizes.count > FEW:
            yield self.whole(tile)
            return
        near = self.sizes.near // self.sizes.block
        start, stop, last = tile.start, tile.stop, self.sizes.count - 1
        if start == 0 and self.sizes.before:
            yield Span(0, 1, 1, near)
            start = 1
        is_cut = start <= last == stop - 1 and self.sizes.after > 0
        if start < stop - is_cut:
            yield Span(start, stop - is_cut, 0, near)
        if is_cut:
            yield Span(last, last + 1, 0, near - 1)

    def whole(self, tile: slice) -> Span:
        return Span(tile.start, tile.stop, 0, self.sizes.near // self.sizes.block)

    def windows(self, rows: Tensor, span: Span) -> Tensor:
        """Of rows of keys, [rows, …], those near each block: a view, [blocks, near, …]."""
        size, row = self.sizes.block, rows.stride(0)
        shape = span.stop - span.start, (span.until - span.first) * size, *rows.shape[1:]
        first = rows.storage_offset() + (span.start + span.first) * size * row
        return rows.as_strided(shape, (size * row, row, *rows.stride()[1:]), first)

    def mask(self, head: int, span: Span) -> Float[Tensor, "#blocks 1 #rows near"] | None:
        """What PyTorch's kernel adds to logits: 0, or for keys that a query does not see `HIDDEN`.
        None if it sees all."""
        alike = head if len(self.most) > 1 else 0
        bias = self.windows(self.most[alike], span)[:, None, None].clamp(max=0)
        is_gappy = bool(bias.any())
        if self.later is None:
            return bias if is_gappy else None
        later = F.pad(self.later.clamp(max=0), (bias.shape[-1] - self.sizes.block, 0))
        later = later.repeat(self.sizes.group, 1)
        if not is_gappy:
            return later[None, None]
        place = alike, span
        if self._last is None or self._last[0] != place:  # most heads are alike
            room = buffers.take("mask", (len(bias), 1, *later.shape), bias)
            self._last = place, torch.minimum(bias, later, out=room)
        return self._last[1]

    def attend(self, head: int, tile: slice, query: Float[Tensor, "blocks rows dim"]) -> Near:
        """By PyTorch's kernel."""
        found = []
        for span in self.spans(tile):
            key, value = self.windows(self.key[head], span), self.windows(self.value[head], span)
            own = query[span.start - tile.start : span.stop - tile.start]
            rows = map(self.widened, (own, key, value))
            out, log_sum = _fused(*rows, attn_mask=self.mask(head, span), scale=self.scale)
            found.append(Near(out.squeeze(1)[..., : value.shape[-1]], log_sum.mT))
        return found[0] if len(found) == 1 else Near(*map(torch.cat, zip(*found, strict=True)))

    def widened(self, x: Float[Tensor, "blocks rows _"]) -> Float[Tensor, "blocks 1 rows _"]:
        """As PyTorch's kernel takes it: one head, and as many columns in values as in keys."""
        rest = max(self.sizes.dim, self.sizes.value_dim) - x.shape[-1]
        return (F.pad(x, (0, rest)) if rest else x).unsqueeze(1)

    def attend_back(
        self,
        head: int,
        tile: slice,
        query: Float[Tensor, "blocks rows dim"],
        out: Float[Tensor, "blocks rows value_dim"],
        log_sum: Float[Tensor, "blocks rows 1"],
        of_out: Float[Tensor, "blocks rows value_dim"],
        of_query: Float[Tensor, "blocks rows dim"],
        of_key: Float[Tensor, "key_rows dim"],
        of_value: Float[Tensor, "key_rows value_dim"],
    ) -> None:
        """Back from the outputs of whole rows, of which near keys are a part. The gradient of
        queries is written, those of keys and values are added."""
        spans = (self.spans(part) for part in slices(tile.stop, self.sizes.span, tile.start))
        for span in itertools.chain.from_iterable(spans):
            own = slice(span.start - tile.start, span.stop - tile.start)
            key, value = self.windows(self.key[head], span), self.windows(self.value[head], span)
            rows = map(self.widened, (of_out[own], query[own], key, value, out[own]))
            mask, normalizer = self.mask(head, span), log_sum[own].mT.contiguous()
            found = _fused_back(*rows, normalizer, 0.0, False, attn_mask=mask, scale=self.scale)
            near_query, near_key, near_value = (
                x.squeeze(1)[..., : like.shape[-1]]
                for x, like in zip(found, (query, key, value), strict=True)
            )
            of_query[own] = near_query
            for of_rows, of_near in ((of_key, near_key), (of_value, near_value)):
                for there, part in self.block_by_block(span, of_rows, of_near):
                    there.add_(part)

    def logits(
        self, head: int, tile: slice, query: Float[Tensor, "blocks rows dim"]
    ) -> Float[Tensor, "blocks rows near"]:
        """In base 2, for softmaxes over more than what is near."""
        sizes, span = self.sizes, self.whole(tile)
        room = buffers.take("near logits", (*query.shape[:2], sizes.near), query)
        key = self.windows(self.key[head], span)
        torch.baddbmm(room, query, key.mT, beta=0, alpha=self.scale * LOG2_E, out=room)
        if self.later is not None:
            own = room[..., sizes.before * sizes.block :]
            own = own.unflatten(1, (sizes.group, sizes.block))
            torch.minimum(own, self.later, out=own)
        alike = head if len(self.most) > 1 else 0
        for block in self.gappy[alike]:
            if tile.start <= block < tile.stop:
                one, part = self.whole(slice(block, block + 1)), room[block - tile.start]
                torch.minimum(part, self.windows(self.most[alike], one), out=part)
        return room

    def weights_back(
        self,
        head: int,
        tile: slice,
        query: Float[Tensor, "blocks rows dim"],
        weights: Float[Tensor, "blocks rows near"],
        of_logits: Float[Tensor, "blocks rows near"],
        of_out: Float[Tensor, "blocks rows value_dim"],
        of_query: Float[Tensor, "blocks rows dim"],
        of_key: Float[Tensor, "key_rows dim"],
        of_value: Float[Tensor, "key_rows value_dim"],
    ) -> None:
        """The same, from the weights of near keys and the gradient of their logits."""
        span = self.whole(tile)
        key = self.windows(self.key[head], span)
        torch.baddbmm(of_query, of_logits, key, beta=0, alpha=self.scale, out=of_query)
        for there, part in self.block_by_block(span, of_key, of_logits.mT):
            there.baddbmm_(part, query, alpha=self.scale)
        for there, part in self.block_by_block(span, of_value, weights.mT):
            there.baddbmm_(part, of_out)

    def block_by_block(
        self, span: Span, rows: Float[Tensor, "rows _"], x: Float[Tensor, "blocks near _"]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of keys as [blocks, block, ·], and what x has for them: the block before each, its
        own, and the one after it. No two rows of one of these are the same."""
        size = self.sizes.block
        near = self.windows(rows, span).split(size, dim=1)
        return zip(near, x.split(size, dim=1), strict=True)
