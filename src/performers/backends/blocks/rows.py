"""The forward pass of some heads, a tile of blocks at a time."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks.far import Averages, Merge
from performers.backends.blocks.neighbors import Neighbors
from performers.backends.blocks.sides import Mapped, Side, of_heads
from performers.backends.blocks.sizes import LOG2_E, Problem, Sizes
from performers.backends.buffers import buffers
from performers.backends.fused_softmax import HIDDEN

__all__ = ["Heads"]


class Frames(NamedTuple):
    """What logits lose before they become weights."""

    row: Float[Tensor, "blocks rows 1"]  # of the sums that outputs are
    parts: list[Float[Tensor, "blocks rows 1"]]  # in the order of `Heads.row_logits`
    features: Float[Tensor, "blocks rows 1"]  # the last of these, with the numbers of rows
    is_alone: Bool[Tensor, "blocks rows 1"] | None  # with a limit: rows without a near key


class Heads:
    """Some heads: their rows in blocks, 0 beyond the last, and what one tile of blocks takes.

    `key` and `value` have blocks of nothing around them, as `Neighbors` needs. Logits, and numbers
    of rows, are in base 2.
    """

    def __init__(
        self, problem: Problem, sizes: Sizes, heads: slice, sides: tuple[Side, Side]
    ) -> None:
        """`sides`: of queries and of keys, for all heads."""
        self.problem, self.sizes, self.heads = problem, sizes, heads
        self.like = problem.average
        self.scale_2 = problem.scale * LOG2_E  # of the logit of a query and a key
        self.log_limit = 0.0 if problem.far_limit is None else math.log2(problem.far_limit)
        self.number = number = heads.stop - heads.start
        blocks = sizes.count + sizes.before + sizes.after
        start = sizes.before * sizes.block
        self.own = own = slice(start, start + sizes.length)  # of rows of keys, the real ones
        self.query = self.in_blocks("query", problem.query)
        self.key = self.take("key", number, blocks * sizes.block, sizes.dim)
        self.value = self.take("value", number, blocks * sizes.block, sizes.value_dim)
        for whole, x in ((self.key, problem.key), (self.value, problem.value)):
            whole[:, : own.start].zero_()
            whole[:, own].copy_(x[heads])
            whole[:, own.stop :].zero_()
        self.sink_key = problem.sink_key[heads].to(self.like)
        self.sink_value = problem.sink_value[heads].to(self.like)
        self.heavy_key = problem.heavy_key[heads].to(self.like)
        self.heavy_value = problem.heavy_value[heads].to(self.like)
        absent = self.hidden(problem.hidden_near, blocks * sizes.block, own)
        self.near = Neighbors(problem, sizes, self.key, self.value, absent)
        self.query_side, self.key_side = sides
        self.mapped_rooms: dict[tuple[bool, int], Mapped] = {}
        length = sizes.count * sizes.block
        self.absent_far = self.hidden(problem.hidden_far, length, slice(0, sizes.length))
        self.is_gappy_far = self.absent_far.unflatten(1, (-1, sizes.block)).any(dim=-1).tolist()

    def take(self, name: str, *shape: int) -> Tensor:
        return buffers.take(name, shape, self.like)

    def in_blocks(self, name: str, x: Float[Tensor, "all_heads group length _"]) -> Tensor:
        """These heads of x as [heads, count, rows, ·]: itself, or a copy that is 0 beyond the
        last row."""
        rows, is_itself = self.room(name, x)
        if not is_itself:
            for part, there in self.paired(x[self.heads], rows):
                there.copy_(part)
            rest = self.sizes.length % self.sizes.block
            if rest:
                self.grouped(rows)[:, -1, :, rest:].zero_()
        return rows

    def room(self, name: str, x: Float[Tensor, "all_heads group length _"]) -> tuple[Tensor, bool]:
        """Where these heads of x are as [heads, count, rows, ·]: in x, if its rows fill whole
        blocks one after another and have the precision of sums; else in a buffer."""
        sizes = self.sizes
        if sizes.is_whole and x.dtype == self.like.dtype and x.stride(-1) == 1:
            return x[self.heads, 0].unflatten(1, (sizes.count, sizes.block)), True
        return self.take(name, self.number, sizes.count, sizes.rows, x.shape[-1]), False

    def grouped(self, rows: Tensor) -> Tensor:
        return rows.unflatten(2, (self.sizes.group, self.sizes.block))

    def paired(self, x: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same rows of both: those of whole blocks, and those of the last that is not whole."""
        blocks = self.grouped(rows)
        whole, rest = divmod(self.sizes.length, self.sizes.block)
        stop = whole * self.sizes.block
        yield x[:, :, :stop].unflatten(2, (whole, -1)).transpose(1, 2), blocks[:, :whole]
        if rest:
            yield x[:, :, stop:], blocks[:, whole, :, :rest]

    def hidden(self, mask: Tensor | None, length: int, real: slice) -> Bool[Tensor, "#heads rows"]:
        """Rows without a key to be seen, one row for all heads where all are alike."""
        if mask is None:
            hidden = torch.ones(1, length, dtype=torch.bool, device=self.like.device)
            hidden[:, real] = False
        else:
            mask = mask[self.heads]
            hidden = F.pad(mask, (real.start, length - real.stop), value=True)
        return hidden

    def tile_rows(self, tile: slice) -> tuple[slice, slice]:
        """Of the keys of a tile, among those of all blocks, and in `key` and `value`."""
        size = self.sizes.block
        rows, shift = slice(tile.start * size, tile.stop * size), self.sizes.before * size
        return rows, slice(rows.start + shift, rows.stop + shift)

    def mapped_rows(self, side: Side, blocks: int, block: int) -> Mapped:
        """Where rows are mapped to, until others are."""
        found = self.mapped_rooms.get((side is self.key_side, blocks))
        if found is None:
            found = side.room("mapped", blocks, block, self.like)
            self.mapped_rooms[side is self.key_side, blocks] = found
        return found

    def mapped_keys(self, index: int, tile: slice) -> Mapped:
        """Room for those of a tile."""
        return self.mapped_rows(self.key_side, tile.stop - tile.start, self.sizes.block)

    def key_logits(self, index: int, tile: slice) -> Tensor:
        """Of the keys of a tile: log₂ φ as [blocks, block, features], in their room."""
        rows, own = self.tile_rows(tile)
        head, mapped = self.heads.start + index, self.mapped_keys(index, tile)
        number = self.key_side.map(head, self.key[index, own], mapped)
        alike = index if len(self.absent_far) > 1 else 0
        if any(self.is_gappy_far[alike][tile]):
            number.masked_fill_(self.absent_far[alike, rows], HIDDEN)
        return self.key_side.plus(head, mapped, number.view(-1, self.sizes.block, 1))

    def block_averages(self) -> Averages:
        """s and A of every block. `self.total`: the sums of weights that this takes, each block's
        largest of a feature being 1."""
        sizes = self.sizes
        shape = self.number, sizes.room, sizes.features
        log_mass = self.take("block mass", *shape)
        average = self.take("block average", *shape[:2], sizes.value_dim, sizes.features)
        self.total = self.take("block total", *shape)
        log_mass[:, sizes.count :], average[:, sizes.count :] = HIDDEN, 0.0
        self.total[:, sizes.count :] = 1.0
        for index in range(self.number if sizes.features else 0):
            for tile in sizes.tiles():
                weights, (_, own) = self.key_logits(index, tile), self.tile_rows(tile)
                value = self.value[index, own].unflatten(0, (-1, sizes.block))
                largest, total = weights.amax(dim=1, keepdim=True), self.total[index, tile, None]
                torch.sum(weights.sub_(largest).exp2_(), dim=1, keepdim=True, out=total)
                torch.bmm(value.mT, weights, out=average[index, tile]).div_(total)
                torch.add(largest, total.log2(), out=log_mass[index, tile, None])
        return Averages(log_mass.div_(LOG2_E), average)

    def far_averages(self, blocks: Averages) -> tuple[Merge, Averages, Tensor]:
        """s̃ and F of every block, and F after the last."""
        problem = self.problem
        number = self.sizes.count, self.sizes.scanned
        before = problem.log_mass[self.heads]
        merge = Merge(blocks.log_mass, before, *number, problem.is_causal)
        average = self.take("far average", *blocks.average.shape)
        first = problem.average[self.heads].mT.contiguous()
        last = merge.far(first, blocks.average, average)
        return merge, Averages(merge.log_mass, average), last.mT

    def numbered(self, far: Averages) -> Float[Tensor, "heads blocks 1 features"]:
        """What the logits of features have that is not of a row: s̃ and the features' numbers."""
        tilt = of_heads(self.problem.tilt, self.heads)
        return (far.log_mass + tilt).unsqueeze(2) * LOG2_E

    def row_logits(
        self, index: int, tile: slice, numbers: Tensor
    ) -> tuple[list[Tensor], Mapped | None, Float[Tensor, "blocks rows 1"] | None]:
        """What the queries of a tile score with sinks, heavy keys and features, each
        [blocks, rows, ·] where there are any; the last without the numbers of rows. What these
        features are computed from, and these numbers."""
        sizes, problem = self.sizes, self.problem
        query, blocks = self.query[index, tile], tile.stop - tile.start
        logits = []
        if sizes.sinks:
            sinks = self.take("sink logits", blocks, sizes.rows, sizes.sinks)
            flat, rows = sinks.flatten(0, 1), query.flatten(0, 1)
            key = self.sink_key[index]
            torch.addmm(flat, rows, key.mT, beta=0, alpha=self.scale_2, out=flat)
            place = torch.arange(blocks * sizes.block, device=rows.device)
            place += tile.start * sizes.block
            unseen = place[:, None] < problem.sink_start[self.heads.start + index]
            unseen = unseen.unflatten(0, (blocks, 1, sizes.block))
            sinks.unflatten(1, (sizes.group, sizes.block)).masked_fill_(unseen, HIDDEN)
            logits.append(sinks)
        if sizes.heavy:
            heavy = self.take("heavy logits", blocks, sizes.rows, sizes.heavy)
            key = self.heavy_key[index, tile]
            torch.baddbmm(heavy, query, key.mT, beta=0, alpha=self.scale_2, out=heavy)
            hidden = problem.heavy_hidden[self.heads.start + index, tile]
            logits.append(heavy.masked_fill_(hidden.unsqueeze(1), HIDDEN))
        mapped = number = None
        if sizes.features:
            side, head = self.query_side, self.heads.start + index
            mapped = self.mapped_rows(side, blocks, sizes.rows)
            number = side.map(head, query.flatten(0, 1), mapped).view(blocks, sizes.rows, 1)
            logits.append(side.plus(head, mapped, numbers[index, tile]))
        return logits, mapped, number

    def values(self, index: int, tile: slice, far: Tensor) -> list[Tensor]:
        """In the order of `row_logits`."""
        values = []
        if self.sizes.sinks:
            values.append(self.sink_value[index].expand(tile.stop - tile.start, -1, -1))
        if self.sizes.heavy:
            values.append(self.heavy_value[index, tile])
        if self.sizes.features:
            values.append(far[index, tile].mT)
        return values

    def attend(self, far: Averages, *outputs: Float[Tensor, "all_heads group length _"]) -> None:
        """Write outputs, the logs of their normalizers and those of the factors of far keys."""
        sizes = self.sizes
        names = ("out", "log sum", "log factor")
        rooms = [self.room(name, x) for name, x in zip(names, outputs, strict=True)]
        out, log_sum, log_factor = (rows for rows, _ in rooms)
        numbers = self.numbered(far)
        for tile, index in itertools.product(sizes.tiles(), range(self.number)):
            query = self.query[index, tile]
            weights, _, number = self.row_logits(index, tile, numbers)
            values = self.values(index, tile, far.average)
            near = self.near.attend(index, tile, query) if self.near.is_fused else None
            if near is None:
                weights.insert(0, self.near.logits(index, tile, query))
                values.insert(0, self.near.windows(self.value[index], self.near.whole(tile)))
            elif not weights:
                out[index, tile], log_sum[index, tile] = near
                continue
            else:  # all that is near is like one key, with its output for a value
                weights.insert(0, (near.log_sum * LOG2_E).clamp_(min=HIDDEN))
            frames = self.frames(weights, number)
            totals = [
                x.sub_(frame).exp2_().sum(dim=-1, keepdim=True)
                for x, frame in zip(weights, frames.parts, strict=True)
            ]
            if sizes.limits:
                log_factor[index, tile] = self.limit(weights, totals, frames)
            total = sum(totals[1:], start=totals[0])
            if near is None:
                found = self.take("found", *query.shape[:2], sizes.value_dim)
                torch.bmm(weights[0], values.pop(0), out=found)
            else:
                found = near.out.mul_(weights[0])
            for x, value in zip(weights[1:], values, strict=True):
                found.baddbmm_(x, value)
            torch.div(found, total, out=out[index, tile])
            torch.add(frames.row, total.log2_(), out=log_sum[index, tile]).div_(LOG2_E)
        log_factor.div_(LOG2_E)
        for x, (rows, is_itself) in zip(outputs, rooms, strict=True):
            if not is_itself:
                self.take_out(rows, x)

    def frames(self, logits: list[Tensor], of_row: Tensor | None) -> Frames:
        """`of_row`: what the logits of features lack.

        The frame of a row is its largest logit, with a limit the largest near one if there is any.
        Then features have one of their own, until `limit` has multiplied them.
        """
        largest = [x.amax(dim=-1, keepdim=True) for x in logits]
        if of_row is not None:
            largest[-1] += of_row
        row = functools.reduce(torch.maximum, largest)
        parts, is_alone = [row] * len(logits), None
        if self.sizes.limits:
            near = functools.reduce(torch.maximum, largest[:-1])
            is_alone = near <= HIDDEN / 2
            row = torch.where(is_alone, row, near)
            parts = [row] * (len(logits) - 1) + [largest[-1]]
        if of_row is not None:
            parts[-1] = parts[-1] - of_row
        return Frames(row, parts, largest[-1], is_alone)

    def limit(self, weights: list[Tensor], totals: list[Tensor], frames: Frames) -> Tensor:
        """Multiply the weights of features, and their sum, by what the limit leaves of them; the
        log of that."""
        assert frames.is_alone is not None
        room = torch.stack(totals[:-1]).sum(dim=0).log2_().add_(frames.row + self.log_limit)
        room -= totals[-1].log2() + frames.features
        log_factor = room.clamp_(max=0).masked_fill_(frames.is_alone, 0.0)
        factor = (log_factor + frames.features - frames.row).exp2_()
        weights[-1] *= factor
        totals[-1] *= factor
        return log_factor

    def take_out(self, rows: Tensor, x: Tensor) -> None:
        """Copy rows to where these heads are in x."""
        for part, there in self.paired(x[self.heads], rows):
            part.copy_(there)
