"""Attention with a near field of blocks, forward and backward by hand, a tile of blocks at a time.

A block of queries scores the keys of its own and the neighboring blocks, a few sinks, and the far
keys that `heavy` chose for it, one by one. It meets all other keys through the features, each of
which stands for all keys of one far block after another:

    keys       far: blocks … b−3, b−2  │ near: b−1, b, b+1 │  far: b+2, b+3 …   (causal: up to b)

    block c    s_cm = log Σ_{j in c} φ_m(k_j)         A_cm = Σ_{j in c} φ_m(k_j) e^(−s_cm) v_j
    far of b   s̃_bm = log Σ_{far c} e^(s_cm)          F_bm = Σ_{far c} e^(s_cm − s̃_bm) A_cm

A query then takes one softmax over a row of logits: q·k_j for what is near, log φ_m(q) + s̃_bm for
each feature m, with v_j and F_bm for their values. Far averages are made of whole blocks, by a scan
from the left and one from the right, so nothing that a causal query reads depends on a later key:
no bound on norms, no passes that depend on the data.

With `far_limit`, the weights of a query's features are multiplied by min(1, limit · N / F), where
N and F are the sums of its near and of its far weights. Where the limit binds, the shares of both
are fixed, and each is a softmax of its own.

The backward pass computes features and averages again: training keeps inputs and outputs alone.
Logits are in base 2, because exp2 costs a CPU less than exp; sums of blocks are in base e.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends.buffers import CAPABILITIES, buffers, slices
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients
from performers.backends.fused_softmax import HIDDEN
from performers.backends.graphs import folded, is_exporting
from performers.backends.reference import absorb, exact_partial, read
from performers.state import LinearState
from performers.typing import LogLinearSide

__all__ = ["BlockAttention", "Problem", "block_attention"]

LOG2_E = math.log2(math.e)
# Of the logits of a tile. Twice the second-level cache, but assign what suits your processor.
TILE_BYTES = 2 * (CAPABILITIES.get("l2_cache_size") or 2**20)
HEADS = 8  # that are worked on in one go; more where all weights of more fit into a tile
# Of their rows and of the averages of all their blocks, which live during a pass only.
HEADS_BYTES = 64 * 2**20


class BlockAttention(NamedTuple):
    """Outputs, the log of their normalizers, the averages of all blocks and of the state before
    them (s̃_m and F_m), and the log of what a limit multiplied the far keys of each query by.
    """

    out: Float[Tensor, "heads group length value_dim"]
    log_sum: Float[Tensor, "heads group length 1"]
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]
    # one number for each query, none without a limit
    log_factor: Float[Tensor, "heads group length _"]


# In what follows: heads = batch · key_heads; rows = the queries of a block, group · window_size of
# them; near = the keys of 3 blocks, causal of 2.


class Problem(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    query: Float[Tensor, "heads group length dim"]
    key: Float[Tensor, "heads length dim"]
    value: Float[Tensor, "heads length value_dim"]
    # keys that no query scores one by one, or by a feature; None for none
    hidden_near: Bool[Tensor, "heads length"] | None
    hidden_far: Bool[Tensor, "heads length"] | None
    sink_key: Float[Tensor, "heads sinks dim"]
    sink_value: Float[Tensor, "heads sinks value_dim"]
    # the first query that sees each sink
    sink_start: Int[Tensor, "heads sinks"]
    # far keys that each block scores one by one, and which of them there are not
    heavy_key: Float[Tensor, "heads blocks heavy dim"]
    heavy_value: Float[Tensor, "heads blocks heavy value_dim"]
    heavy_hidden: Bool[Tensor, "heads blocks heavy"]
    # of the two sides, one row for all heads or one for each; no features: nothing far
    query_directions: Float[Tensor, "#heads num_features dim"]
    query_shift: Float[Tensor, "#heads 1 dim"] | None
    query_matrix: Float[Tensor, "#heads dim dim"] | None
    query_linear: Float[Tensor, "#heads 1 dim"] | None
    key_directions: Float[Tensor, "#heads num_features dim"]
    key_shift: Float[Tensor, "#heads 1 dim"] | None
    key_matrix: Float[Tensor, "#heads dim dim"] | None
    key_linear: Float[Tensor, "#heads 1 dim"] | None
    # the numbers of a feature and of both sides, together
    tilt: Float[Tensor, "#heads 1 num_features"]
    # the state before the first block
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]
    window_size: int
    scale: float
    is_causal: bool
    far_limit: float | None


class _Averages(NamedTuple):
    """Of every block, or of what is far of it: s and A, or s̃ and F.

    Features come last: a factor for each then runs along the memory.
    """

    log_mass: Float[Tensor, "heads blocks num_features"]
    average: Float[Tensor, "heads blocks value_dim num_features"]


class _Scan:
    """Blocks added up one after another: log-masses after 0, 1, 2, … of them, and the share of each
    in what there is with it; `kept` is that of what was there."""

    def __init__(self, first: Tensor, log_mass: Float[Tensor, "heads blocks num_features"]) -> None:
        total = torch.cat([first.unsqueeze(1), log_mass], dim=1).logcumsumexp(dim=1)
        self.log_mass = total
        self.kept = (total[:, :-1] - total[:, 1:]).exp_().unsqueeze(-2).unbind(1)
        self.added = (log_mass - total[:, 1:]).exp_().unsqueeze(-2).unbind(1)

    def step_back(self, index: int, gradient: Tensor, of_block: Tensor) -> None:
        """The gradient of an average, back over the step that added a block."""
        of_block.addcmul_(gradient, self.added[index])
        gradient.mul_(self.kept[index])


class _Merge:
    """What is far of each block: the state and the blocks before it, and those after it."""

    def __init__(self, log_mass: Tensor, first: Tensor, is_causal: bool) -> None:
        self.count, self.is_causal = log_mass.shape[1], is_causal
        place = torch.arange(self.count, device=first.device)
        self.before = _Scan(first, log_mass)
        self.log_mass = self.before.log_mass[:, (place - 1).clamp(min=0)]
        if not is_causal:
            self.after = _Scan(torch.full_like(first, HIDDEN), log_mass.flip(1))
            later = self.after.log_mass[:, (self.count - 2 - place).clamp(min=0)]
            parts = self.log_mass, later
            self.log_mass = torch.logaddexp(*parts)
            self.shares = [(part - self.log_mass).exp_().unsqueeze(-2).unbind(1) for part in parts]

    def far(self, first: Tensor, blocks: Tensor, far: Tensor) -> Tensor:
        """Write F of each block, of the average before the sequence and those of blocks; the
        average of all."""
        average, rows, added = blocks.unbind(1), far.unbind(1), self.before.added
        for block in range(self.count):
            if block < 2:
                rows[block].copy_(first)
            else:
                torch.lerp(rows[block - 1], average[block - 2], added[block - 2], out=rows[block])
        last = rows[-1]
        for block in range(max(0, self.count - 2), self.count):
            last = torch.lerp(last, average[block], added[block])
        if not self.is_causal:
            after = torch.zeros_like(first)
            for block in reversed(range(self.count - 2)):
                after.lerp_(average[block + 2], self.after.added[self.count - 3 - block])
                rows[block].lerp_(after, self.shares[1][block])
        return last

    def far_back(self, of_last: Tensor, of_far: Tensor, of_blocks: Tensor) -> Tensor:
        """The same way back, for gradients of averages or anything that goes with them; `of_blocks`
        begins as 0. The gradient of the first."""
        running, of_rows, of_average = of_last.clone(), of_far.unbind(1), of_blocks.unbind(1)
        for block in reversed(range(max(0, self.count - 2), self.count)):
            self.before.step_back(block, running, of_average[block])
        for block in reversed(range(self.count)):
            if self.is_causal:
                running.add_(of_rows[block])
            else:
                running.addcmul_(of_rows[block], self.shares[0][block])
            if block >= 2:
                self.before.step_back(block - 2, running, of_average[block - 2])
        if not self.is_causal:
            after = torch.zeros_like(running)
            for block in range(self.count - 2):
                after.addcmul_(of_rows[block], self.shares[1][block])
                self.after.step_back(self.count - 3 - block, after, of_average[block + 2])
        return running


class _Side(NamedTuple):
    """What the features of queries, or of keys, are computed from, x being their rows in `_Heads`.

    log φ_m(x) = y·ω_m + number, but for the numbers of the features
    y = (x − shift) matrix,     number = (x − shift)·linear − ‖y‖²/2
    """

    directions: Float[Tensor, "#heads num_features dim"]
    shift: Float[Tensor, "#heads 1 dim"] | None
    matrix: Float[Tensor, "#heads dim dim"] | float
    linear: Float[Tensor, "#heads 1 dim"] | None

    @classmethod
    def of(
        cls,
        unit: float,
        directions: Tensor,
        shift: Tensor | None,
        matrix: Tensor | None,
        linear: Tensor | None,
    ) -> _Side:
        """For rows that are x / unit."""
        return cls(
            directions,
            None if shift is None else shift / unit,
            unit if matrix is None else matrix * unit,
            None if linear is None else linear * unit,
        )

    def mapped(self, heads: slice, x: Tensor, y: Tensor, number: Tensor) -> None:
        """Write y and number, [heads, rows, dim] and [heads, rows], so many rows at a time that
        they stay in the cache."""
        size = TILE_BYTES // (4 * len(x) * x.shape[2] * x.element_size())
        for rows in slices(x.shape[1], max(64, size)):
            part, of_part, of_number = x[:, rows], y[:, rows], number[:, rows]
            spare = buffers.take("spare", part.shape, x)
            if self.shift is not None:
                centered = buffers.take("centered", part.shape, x)
                part = torch.sub(part, _of(self.shift, heads), out=centered)
            if isinstance(self.matrix, float):
                torch.mul(part, self.matrix, out=of_part)
            else:
                torch.bmm(part, _of(self.matrix, heads).expand(len(x), -1, -1), out=of_part)
            torch.sum(torch.mul(of_part, of_part, out=spare), dim=-1, out=of_number).mul_(-0.5)
            if self.linear is not None:
                of_number.add_((part @ _of(self.linear, heads).mT).squeeze(-1))

    def mapped_back(self, heads: slice, y: Tensor, of_y: Tensor, of_number: Tensor) -> Tensor:
        """The gradient of x; that of y is lost."""
        of_number = of_number.unsqueeze(-1)
        of_x = of_y.addcmul_(y, of_number, value=-1)
        if isinstance(self.matrix, float):
            of_x.mul_(self.matrix)
        else:
            matrix = _of(self.matrix, heads).expand(len(y), -1, -1)
            of_x = torch.bmm(of_x, matrix.mT, out=buffers.take("spare", of_y.shape, of_y))
        if self.linear is not None:
            of_x.addcmul_(of_number, _of(self.linear, heads))
        return of_x


def _scaled(x: Tensor, factor: float, out: Tensor) -> None:
    """out = factor · x, in the precision of `out`."""
    if x.dtype == out.dtype:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x).mul_(factor)


def _of(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x


class _Sizes:
    """Sizes of a problem, and of what is done at a time."""

    def __init__(self, problem: Problem) -> None:
        self.heads, self.group, self.length, self.dim = problem.query.shape
        self.value_dim, self.features = problem.average.shape[-1], problem.average.shape[-2]
        self.block, self.sinks = min(problem.window_size, self.length), problem.sink_key.shape[1]
        self.heavy = problem.heavy_key.shape[2]
        self.count = -(-self.length // self.block)
        self.rows = self.group * self.block
        self.before = int(self.count > 1)  # blocks that are near beside a query's own
        self.after = 0 if problem.is_causal else self.before
        self.near = (1 + self.before + self.after) * self.block
        size = problem.average.element_size()
        columns = self.near + self.sinks + self.heavy + self.features
        self.tile = max(1, min(self.count, TILE_BYTES // (self.rows * columns * size)))
        averages = 4 * self.count * self.features * self.value_dim
        rows = self.count * self.block * 3 * (self.group + 2) * self.dim
        whole = TILE_BYTES // (self.count * self.rows * columns * size)
        most = HEADS_BYTES // (size * (averages + rows))
        self.at_once = max(1, min(max(HEADS, whole), most))
        # numbers of a query that say by how much its far keys are too many
        self.limits = 0 if problem.far_limit is None or not self.features else 1

    def head_groups(self) -> Iterator[slice]:
        return slices(self.heads, self.at_once)

    def tiles(self) -> Iterator[slice]:
        return slices(self.count, self.tile)


class _Heads:
    """Some heads: their rows in blocks, 0 beyond the last, and what one tile of blocks takes.

    `key` and `value` begin with a block of nothing, and end with one unless causal, so that what is
    near of each block are rows that follow each other. Numbers and logits of rows are in base 2.
    """

    def __init__(self, problem: Problem, sizes: _Sizes, heads: slice) -> None:
        self.problem, self.sizes, self.heads = problem, sizes, heads
        self.like = problem.average
        self.root = math.sqrt(problem.scale)
        self.log_limit = 0.0 if problem.far_limit is None else math.log2(problem.far_limit)
        self.number = number = heads.stop - heads.start
        blocks = sizes.count + sizes.before + sizes.after
        start = sizes.before * sizes.block
        self.own = own = slice(start, start + sizes.length)  # of rows of keys, the real ones
        self.query = self.take("query", number, sizes.count, sizes.rows, sizes.dim)
        self.key = self.take("key", number, blocks * sizes.block, sizes.dim)
        self.value = self.take("value", number, blocks * sizes.block, sizes.value_dim)
        self.put(problem.query[heads], self.query, self.root)
        for whole, x, factor in (
            (self.key, problem.key, self.root * LOG2_E),
            (self.value, problem.value, 1.0),
        ):
            whole[:, : own.start].zero_()
            _scaled(x[heads], factor, whole[:, own])
            whole[:, own.stop :].zero_()
        self.sink_key = problem.sink_key[heads].to(self.like) * (self.root * LOG2_E)
        self.sink_value = problem.sink_value[heads].to(self.like)
        self.heavy_key = problem.heavy_key[heads].to(self.like) * (self.root * LOG2_E)
        self.heavy_value = problem.heavy_value[heads].to(self.like)
        self.absent = self.hidden(problem.hidden_near, blocks * sizes.block, own)
        later = torch.ones(sizes.block, sizes.block, dtype=torch.bool, device=self.like.device)
        self.later = later.triu_(1)
        self.query_side = _Side.of(
            1.0, problem.query_directions, problem.query_shift, problem.query_matrix,
            problem.query_linear,
        )  # fmt: skip
        self.key_side = _Side.of(
            1 / LOG2_E, problem.key_directions, problem.key_shift, problem.key_matrix,
            problem.key_linear,
        )  # fmt: skip
        if sizes.features:
            self.query_y, self.query_number = self.mapped(
                "query", self.query_side, self.query.flatten(1, 2)
            )
            rows = self.key[:, start : start + sizes.count * sizes.block]
            self.key_y, self.key_number = self.mapped("key", self.key_side, rows)
            absent = self.hidden(problem.hidden_far, rows.shape[1], slice(0, sizes.length))
            self.key_number.masked_fill_(absent, HIDDEN)

    def take(self, name: str, *shape: int) -> Tensor:
        return buffers.take(name, shape, self.like)

    def put(self, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """[heads, group, length, ·] times a factor into [heads, count, rows, ·]."""
        for part, there in self.paired(x, rows):
            _scaled(part, factor, there)
        rest = self.sizes.length % self.sizes.block
        if rest:
            self.grouped(rows)[:, -1, :, rest:].zero_()

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

    def mapped(self, name: str, side: _Side, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and number of rows, the number in base 2."""
        y, number = self.take(f"{name} y", *x.shape), self.take(f"{name} number", *x.shape[:2])
        side.mapped(self.heads, x, y, number)
        return y, number.mul_(LOG2_E)

    def windows(self, rows: Tensor, tile: slice) -> Tensor:
        """Of rows of keys, [rows, …], those near each block: a view, [blocks, near, …]."""
        size, row = self.sizes.block, rows.stride(0)
        shape = tile.stop - tile.start, self.sizes.near, *rows.shape[1:]
        strides = size * row, row, *rows.stride()[1:]
        return rows[tile.start * size :].as_strided(shape, strides)

    def directions(self, side: _Side, index: int) -> Float[Tensor, "features dim"]:
        """ω of one head."""
        return side.directions[self.heads.start + index if len(side.directions) > 1 else 0]

    def key_logits(self, index: int, directions_2: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """log₂ φ of the keys of a tile, [blocks, block, features], and their values."""
        size = self.sizes.block
        rows = slice(tile.start * size, tile.stop * size)
        logits = self.take("key logits", rows.stop - rows.start, self.sizes.features)
        torch.mm(self.key_y[index, rows], directions_2.mT, out=logits)
        logits.add_(self.key_number[index, rows].unsqueeze(-1))
        shift = self.sizes.before * size
        value = self.value[index, rows.start + shift : rows.stop + shift]
        return logits.unflatten(0, (-1, size)), value.unflatten(0, (-1, size))

    def block_averages(self) -> _Averages:
        """s and A of every block."""
        sizes = self.sizes
        shape = self.number, sizes.count, sizes.features
        log_mass = self.take("block mass", *shape)
        average = self.take("block average", *shape[:2], sizes.value_dim, sizes.features)
        for index in range(self.number if sizes.features else 0):
            directions_2 = self.directions(self.key_side, index) * LOG2_E
            for tile in sizes.tiles():
                weights, value = self.key_logits(index, directions_2, tile)
                largest = weights.amax(dim=1, keepdim=True)
                total = weights.sub_(largest).exp2_().sum(dim=1, keepdim=True)
                torch.bmm(value.mT, weights, out=average[index, tile]).div_(total)
                torch.add(largest, total.log2_(), out=log_mass[index, tile].unsqueeze(1))
        return _Averages(log_mass.div_(LOG2_E), average)

    def far_averages(self, blocks: _Averages) -> tuple[_Merge, _Averages, Tensor]:
        """s̃ and F of every block, and F after the last."""
        problem = self.problem
        merge = _Merge(blocks.log_mass, problem.log_mass[self.heads], problem.is_causal)
        average = self.take("far average", *blocks.average.shape)
        first = problem.average[self.heads].mT.contiguous()
        last = merge.far(first, blocks.average, average)
        return merge, _Averages(merge.log_mass, average), last.mT

    def numbered(self, far: _Averages) -> Float[Tensor, "heads blocks 1 features"]:
        """What the logits of features have that is not of a row: s̃ and the features' numbers."""
        tilt = _of(self.problem.tilt, self.heads)
        return (far.log_mass + tilt).unsqueeze(2) * LOG2_E

    def row_logits(
        self, index: int, directions_2: Tensor, tile: slice, numbers: Tensor
    ) -> list[Tensor]:
        """What the queries of a tile score with near keys, sinks, heavy keys and features, each
        [blocks, rows, ·] where there are any; the last without the numbers of rows."""
        sizes, problem = self.sizes, self.problem
        query, blocks = self.query[index, tile], tile.stop - tile.start
        near = self.take("near logits", blocks, sizes.rows, sizes.near)
        torch.bmm(query, self.windows(self.key[index], tile).mT, out=near)
        if problem.is_causal:
            own = near[..., sizes.before * sizes.block :]
            own.unflatten(1, (sizes.group, sizes.block)).masked_fill_(self.later, HIDDEN)
        absent = self.absent[index if len(self.absent) > 1 else 0]
        if problem.hidden_near is not None:
            near.masked_fill_(self.windows(absent, tile).unsqueeze(1), HIDDEN)
        else:  # only beyond the first and last blocks
            for block in {0, sizes.count - 2, sizes.count - 1} & {*range(tile.start, tile.stop)}:
                window = self.windows(absent, slice(block, block + 1))
                near[block - tile.start].masked_fill_(window, HIDDEN)
        logits = [near]
        if sizes.sinks:
            sinks = self.take("sink logits", blocks, sizes.rows, sizes.sinks)
            rows = query.flatten(0, 1)
            torch.mm(rows, self.sink_key[index].mT, out=sinks.flatten(0, 1))
            place = torch.arange(blocks * sizes.block, device=rows.device)
            place += tile.start * sizes.block
            unseen = place[:, None] < problem.sink_start[self.heads.start + index]
            unseen = unseen.unflatten(0, (blocks, 1, sizes.block))
            sinks.unflatten(1, (sizes.group, sizes.block)).masked_fill_(unseen, HIDDEN)
            logits.append(sinks)
        if sizes.heavy:
            heavy = self.take("heavy logits", blocks, sizes.rows, sizes.heavy)
            torch.bmm(query, self.heavy_key[index, tile].mT, out=heavy)
            hidden = problem.heavy_hidden[self.heads.start + index, tile]
            logits.append(heavy.masked_fill_(hidden.unsqueeze(1), HIDDEN))
        if sizes.features:
            features = self.take("feature logits", blocks, sizes.rows, sizes.features)
            y = self.query_y[index, tile.start * sizes.rows : tile.stop * sizes.rows]
            torch.mm(y, directions_2.mT, out=features.flatten(0, 1))
            features.add_(numbers[index, tile])
            logits.append(features)
        return logits

    def row_numbers(self, index: int, tile: slice) -> Float[Tensor, "blocks rows 1"]:
        """What the logits of features have that is of a row."""
        rows = self.query_number[index].unflatten(0, (self.sizes.count, self.sizes.rows))
        return rows[tile].unsqueeze(-1)

    def values(self, index: int, tile: slice, far: Tensor) -> list[Tensor]:
        """In the order of `row_logits`."""
        values = [self.windows(self.value[index], tile)]
        if self.sizes.sinks:
            sinks = self.sink_value[index]
            values.append(sinks.expand(len(values[0]), -1, -1))
        if self.sizes.heavy:
            values.append(self.heavy_value[index, tile])
        if self.sizes.features:
            values.append(far[index, tile].mT)
        return values

    def attend(self, far: _Averages) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, the logs of their normalizers and of the factors of far keys, [heads, count,
        rows, ·]."""
        sizes = self.sizes
        shape = self.number, sizes.count, sizes.rows
        out, log_sum = self.take("out", *shape, sizes.value_dim), self.take("log sum", *shape, 1)
        log_factor = self.take("log factor", *shape, sizes.limits)
        numbers = self.numbered(far)
        for index in range(self.number):
            directions_2 = self.directions(self.query_side, index) * LOG2_E
            for tile in sizes.tiles():
                weights = self.row_logits(index, directions_2, tile, numbers)
                largest = [x.amax(dim=-1, keepdim=True) for x in weights]
                if sizes.features:
                    of_row = self.row_numbers(index, tile)
                    largest[-1] += of_row
                shift = torch.stack(largest).amax(dim=0) if len(largest) > 1 else largest[0]
                shifts = [shift] * len(weights)
                if sizes.limits:
                    near_shift = torch.stack(largest[:-1]).amax(dim=0)
                    is_alone = near_shift <= HIDDEN / 2  # nothing is near
                    shift = torch.where(is_alone, shift, near_shift)
                    shifts = [shift] * (len(weights) - 1) + [largest[-1]]
                if sizes.features:
                    shifts[-1] = shifts[-1] - of_row
                totals = [
                    x.sub_(of_x).exp2_().sum(dim=-1, keepdim=True)
                    for x, of_x in zip(weights, shifts, strict=True)
                ]
                if sizes.limits:
                    room = torch.stack(totals[:-1]).sum(dim=0).log2_().add_(shift + self.log_limit)
                    room -= totals[-1].log2() + largest[-1]
                    factor = room.clamp_(max=0).masked_fill_(is_alone, 0.0)
                    log_factor[index, tile] = factor
                    factor = (factor + largest[-1] - shift).exp2_()
                    weights[-1] *= factor
                    totals[-1] *= factor
                total = sum(totals[1:], start=totals[0])
                found = out[index, tile]
                values = self.values(index, tile, far.average)
                torch.bmm(weights[0], values[0], out=found)
                for x, value in zip(weights[1:], values[1:], strict=True):
                    found.baddbmm_(x, value)
                found.div_(total)
                torch.add(shift, total.log2_(), out=log_sum[index, tile])
        return out, log_sum.div_(LOG2_E), log_factor.div_(LOG2_E)


class _Backward(_Heads):
    """Some heads on the way back: the gradients of all that `_Heads` has of them.

    The gradient of a logit is w (dO·v − e): w its weight, e what all logits of its softmax lose.
    Where a limit c binds, near and far are two softmaxes, whose weights sum to 1 / (1 + c) and
    c / (1 + c).
    """

    def __init__(
        self,
        problem: Problem,
        sizes: _Sizes,
        heads: slice,
        found: BlockAttention,
        gradients: BlockAttention,
        with_directions: bool,
    ) -> None:
        super().__init__(problem, sizes, heads)
        self.with_directions = with_directions
        shape = self.query.shape[:-1]
        self.of_out = self.take("of out", *shape, sizes.value_dim)
        self.put(gradients.out[heads], self.of_out)
        self.log_sum, self.excess = self.take("log sum", *shape, 1), self.take("excess", *shape, 1)
        self.put(found.log_sum[heads], self.log_sum, LOG2_E)
        spare = self.take("spare", *self.of_out.shape)
        self.put(found.out[heads], spare)
        self.put(gradients.log_sum[heads], self.excess, -1.0)
        self.excess += spare.mul_(self.of_out).sum(dim=-1, keepdim=True)
        if sizes.limits:
            self.log_factor = self.take("log factor", *shape, 1)
            self.put(found.log_factor[heads], self.log_factor, LOG2_E)
            self.of_log_sum = self.take("of log sum", *shape, 1)
            self.put(gradients.log_sum[heads], self.of_log_sum)
        self.of_query = self.take("of query", *self.query.shape)
        self.of_key = self.take("of key", *self.key.shape).zero_()
        self.of_value = self.take("of value", *self.value.shape).zero_()
        self.of_sink_key = torch.zeros_like(self.sink_key)
        self.of_sink_value = torch.zeros_like(self.sink_value)
        self.of_heavy_key = torch.empty_like(self.heavy_key)
        self.of_heavy_value = torch.empty_like(self.heavy_value)
        if sizes.features:
            self.of_query_y = self.take("of query y", *self.query_y.shape)
            self.of_query_number = self.take("of query number", *self.query_number.shape)
            self.of_key_y = self.take("of key y", *self.key_y.shape)
            self.of_key_number = self.take("of key number", *self.key_number.shape)
        directions = self.number, sizes.features if with_directions else 0, sizes.dim
        self.of_query_directions = self.like.new_zeros(directions)
        self.of_key_directions = self.like.new_zeros(directions)
        self.of_tilt = self.like.new_zeros(self.number, 1, sizes.features)

    def rows_back(self, far: _Averages) -> tuple[Tensor, Tensor]:
        """Back through the softmaxes of rows: dF, and e of each feature's sum over far blocks."""
        sizes = self.sizes
        of_average = self.take("of far average", *far.average.shape)
        excess = self.take("excess of far", *far.log_mass.shape)
        numbers = self.numbered(far)
        for index in range(self.number):
            directions = self.directions(self.query_side, index)
            directions_2 = directions * LOG2_E
            for tile in sizes.tiles():
                query, of_query, of_out, log_sum, lost = (
                    x[index, tile]
                    for x in (self.query, self.of_query, self.of_out, self.log_sum, self.excess)
                )
                weights = self.row_logits(index, directions_2, tile, numbers)
                shifts = [log_sum] * len(weights)
                if sizes.features:
                    shifts[-1] = log_sum - self.row_numbers(index, tile)
                if sizes.limits:
                    shifts[-1] = shifts[-1] - self.log_factor[index, tile]
                of_logits = []
                values = self.values(index, tile, far.average)
                for part, (x, shift, value) in enumerate(zip(weights, shifts, values, strict=True)):
                    # ≤ 0, but for the rounding of very large numbers
                    x.sub_(shift).clamp_(max=0).exp2_()
                    of_x = self.take(f"of row logits {part}", *x.shape)
                    of_logits.append(torch.bmm(of_out, value.mT, out=of_x))
                losses = [lost] * len(weights)
                if sizes.limits:
                    losses = self.losses(index, tile, lost, weights, of_logits)
                    lost = losses[-1]
                for x, of_x, of_softmax in zip(weights, of_logits, losses, strict=True):
                    of_x.sub_(of_softmax).mul_(x)

                near, of_near = weights[0], of_logits[0]
                self.add_near(self.of_value[index], tile, near, of_out)
                self.add_near(self.of_key[index], tile, of_near, query, 1 / LOG2_E)
                key = self.windows(self.key[index], tile)
                torch.baddbmm(of_query, of_near, key, beta=0, alpha=1 / LOG2_E, out=of_query)
                if sizes.sinks:
                    sinks, of_sinks = weights[1].flatten(0, 1), of_logits[1].flatten(0, 1)
                    flat, of_flat = query.flatten(0, 1), of_query.flatten(0, 1)
                    self.of_sink_value[index].addmm_(sinks.mT, of_out.flatten(0, 1))
                    self.of_sink_key[index].addmm_(of_sinks.mT, flat, alpha=1 / LOG2_E)
                    of_flat.addmm_(of_sinks, self.sink_key[index], alpha=1 / LOG2_E)
                if sizes.heavy:
                    part = 1 + bool(sizes.sinks)
                    heavy, of_heavy = weights[part], of_logits[part]
                    torch.bmm(heavy.mT, of_out, out=self.of_heavy_value[index, tile])
                    torch.bmm(of_heavy.mT, query, out=self.of_heavy_key[index, tile])
                    key = self.heavy_key[index, tile]
                    of_query.baddbmm_(of_heavy, key, alpha=1 / LOG2_E)
                if sizes.features:
                    features, of_features = weights[-1], of_logits[-1]
                    torch.bmm(of_out.mT, features, out=of_average[index, tile])
                    torch.bmm(lost.mT, features, out=excess[index, tile].unsqueeze(-2))
                    rows = slice(tile.start * sizes.rows, tile.stop * sizes.rows)
                    of_features = of_features.flatten(0, 1)
                    torch.mm(of_features, directions, out=self.of_query_y[index, rows])
                    torch.sum(of_features, dim=-1, out=self.of_query_number[index, rows])
                    if self.with_directions:
                        y = self.query_y[index, rows]
                        self.of_query_directions[index].addmm_(of_features.mT, y)
                        self.of_tilt[index] += of_features.sum(dim=0)
        if sizes.features:
            y, of_y, of_number = self.query_y, self.of_query_y, self.of_query_number
            of_x = self.query_side.mapped_back(self.heads, y, of_y, of_number)
            self.of_query += of_x.view_as(self.of_query)
        return of_average, excess

    def losses(
        self, index: int, tile: slice, lost: Tensor, weights: list[Tensor], of_logits: list[Tensor]
    ) -> list[Tensor]:
        """e of each part: that of the softmax over all, or where the limit binds its own."""
        assert self.problem.far_limit is not None
        limit, of_log_sum = self.problem.far_limit, self.of_log_sum[index, tile]
        of_near = torch.zeros_like(lost)
        for x, of_x in zip(weights[:-1], of_logits[:-1], strict=True):
            spare = self.take("limited", *x.shape)
            of_near += torch.mul(x, of_x, out=spare).sum(dim=-1, keepdim=True)
        is_limited = self.log_factor[index, tile] < 0
        near = torch.where(is_limited, (of_near - of_log_sum) * (1 + limit), lost)
        far = torch.where(is_limited, (lost + of_log_sum - of_near) * (1 + 1 / limit), lost)
        return [near] * (len(weights) - 1) + [far]

    def add_near(
        self, of_rows: Tensor, tile: slice, weights: Tensor, x: Tensor, factor: float = 1.0
    ) -> None:
        """Add weightsᵀ x to the keys that are near each block."""
        size = self.sizes.block
        rows = of_rows[tile.start * size :]
        for start in range(0, self.sizes.near, size):
            there = rows[start : start + len(x) * size].view(len(x), size, -1)
            there.baddbmm_(weights[..., start : start + size].mT, x, alpha=factor)

    def keys_back(self, blocks: _Averages, of_average: Tensor, excess: Tensor) -> None:
        """Back through the averages of blocks."""
        sizes = self.sizes
        log_mass = (blocks.log_mass * LOG2_E).unsqueeze(2)
        shift = sizes.before * sizes.block
        for index in range(self.number):
            directions = self.directions(self.key_side, index)
            directions_2 = directions * LOG2_E
            for tile in sizes.tiles():
                weights, value = self.key_logits(index, directions_2, tile)
                weights.sub_(log_mass[index, tile]).clamp_(max=0).exp2_()
                rows = slice(tile.start * sizes.block, tile.stop * sizes.block)
                own = self.of_value[index, rows.start + shift : rows.stop + shift]
                own.view_as(value).baddbmm_(weights, of_average[index, tile].mT)
                of_logits = self.take("of key logits", *weights.shape)
                torch.bmm(value, of_average[index, tile], out=of_logits)
                of_logits.sub_(excess[index, tile].unsqueeze(1)).mul_(weights)
                of_logits = of_logits.flatten(0, 1)
                torch.mm(of_logits, directions, out=self.of_key_y[index, rows])
                torch.sum(of_logits, dim=-1, out=self.of_key_number[index, rows])
                if self.with_directions:
                    y = self.key_y[index, rows]
                    self.of_key_directions[index].addmm_(of_logits.mT, y)
        of_x = self.key_side.mapped_back(self.heads, self.key_y, self.of_key_y, self.of_key_number)
        self.of_key[:, shift : shift + of_x.shape[1]] += of_x


def forward(problem: Problem) -> BlockAttention:
    """Attention of all heads."""
    sizes = _Sizes(problem)
    out = problem.query.new_empty(*problem.query.shape[:3], sizes.value_dim)
    log_sum = problem.average.new_empty(*problem.query.shape[:3], 1)
    log_factor = log_sum.new_empty(*problem.query.shape[:3], sizes.limits)
    log_mass, average = torch.empty_like(problem.log_mass), torch.empty_like(problem.average)
    for heads in sizes.head_groups():
        work = _Heads(problem, sizes, heads)
        merge, far, average[heads] = work.far_averages(work.block_averages())
        log_mass[heads] = merge.before.log_mass[:, -1]
        for x, rows in zip((out, log_sum, log_factor), work.attend(far), strict=True):
            for part, there in work.paired(x[heads], rows):
                part.copy_(there)
    return BlockAttention(out, log_sum, log_mass, average, log_factor)


# The arguments that have a gradient, in the order of `Problem`.
DIFFERENTIABLE = (
    "query", "key", "value", "sink_key", "sink_value", "heavy_key", "heavy_value",
    "query_directions", "key_directions", "tilt", "log_mass", "average",
)  # fmt: skip
SHARED = ("query_directions", "key_directions", "tilt")  # which heads may have in common


def backward(
    problem: Problem, found: BlockAttention, gradients: BlockAttention, with_directions: bool
) -> list[Tensor]:
    """The gradients of what is `DIFFERENTIABLE`. Those of directions and tilt are 0 unless asked
    for."""
    sizes = _Sizes(problem)
    of = {name: torch.empty_like(getattr(problem, name)) for name in DIFFERENTIABLE}
    for name in SHARED:
        of[name].zero_()
    for heads in sizes.head_groups():
        work = _Backward(problem, sizes, heads, found, gradients, with_directions)
        blocks = work.block_averages()
        merge, far, last = work.far_averages(blocks)
        of_far, excess = work.rows_back(far)
        if sizes.features:
            of_last = gradients.average[heads]
            lost = (of_last * last).sum(dim=-1) - gradients.log_mass[heads]
            of_blocks = work.take("of block average", *of_far.shape).zero_()
            excess_of_blocks = torch.zeros_like(excess)
            of_first = merge.far_back(of_last.mT, of_far, of_blocks).mT
            lost = merge.far_back(
                lost.unsqueeze(-2), excess.unsqueeze(-2), excess_of_blocks.unsqueeze(-2)
            )
            work.keys_back(blocks, of_blocks, excess_of_blocks)
            of["average"][heads] = of_first
            along = (of_first * problem.average[heads]).sum(dim=-1)
            of["log_mass"][heads] = along - lost.squeeze(-2)
        for part, rows in work.paired(of["query"][heads], work.of_query):
            torch.mul(rows, work.root, out=part)
        torch.mul(work.of_key[:, work.own], work.root * LOG2_E, out=of["key"][heads])
        of["value"][heads] = work.of_value[:, work.own]
        of["sink_key"][heads] = work.of_sink_key * (work.root * LOG2_E)
        of["sink_value"][heads] = work.of_sink_value
        # of logits in base 2, by keys in base e
        of["heavy_key"][heads] = work.of_heavy_key * work.root
        of["heavy_value"][heads] = work.of_heavy_value
        if with_directions:
            for name in SHARED:
                part, whole = getattr(work, f"of_{name}"), of[name]
                if len(whole) > 1:
                    whole[heads] = part
                else:
                    whole += part.sum(dim=0, keepdim=True)
    return list(of.values())


def plain(*arguments: Any) -> BlockAttention:
    """The operator as a formula, a block of queries at a time."""
    problem = Problem(*arguments)
    dtype, root = problem.average.dtype, math.sqrt(problem.scale)
    group, length = problem.query.shape[1:3]
    # No length that changes may be the size of a block in an exported graph.
    size = problem.window_size if is_exporting() else min(problem.window_size, length)
    has_features = problem.average.shape[-2] > 0

    def one(x: Tensor | None) -> Tensor | None:
        """A head as a batch of one key head."""
        return None if x is None else x.unsqueeze(1)

    def blocks(x: Tensor) -> Float[Tensor, "blocks *heads block _"]:
        x = F.pad(x, (0, 0, 0, -length % size))
        return x.unflatten(-2, (-1, size)).movedim(-3, 0)

    def of_neighbors(x: Tensor) -> list[Float[Tensor, "blocks heads block _"]]:
        """Of the block before each, of its own, and of the one after it unless causal."""
        nothing = torch.zeros_like(x[:1])
        later = [] if problem.is_causal else [torch.cat([x[1:], nothing])]
        return [torch.cat([nothing, x[:-1]]), x, *later]

    def shown(hidden: Tensor | None) -> Float[Tensor, "blocks heads block 1"]:
        """1 for keys that are not hidden, 0 for others and beyond the last."""
        ones = torch.ones_like(problem.key[..., :1], dtype=dtype)
        return blocks(ones if hidden is None else ones.masked_fill(hidden.unsqueeze(-1), 0.0))

    query_side = LogLinearSide(
        problem.query_directions.unsqueeze(1), 0.0, problem.tilt, one(problem.query_shift),
        one(problem.query_matrix), one(problem.query_linear),
    )  # fmt: skip
    key_side = LogLinearSide(
        problem.key_directions.unsqueeze(1), 0.0, None, one(problem.key_shift),
        one(problem.key_matrix), one(problem.key_linear),
    )  # fmt: skip

    def absorbed(carry: list[Tensor], block: list[Tensor]) -> list[Tensor]:
        log_scale, normalizer, values = carry
        state = LinearState(log_scale, normalizer, values)
        key, value, is_shown = block
        features = key_side.log_linear(key.unsqueeze(1)).features()
        after = absorb(state, features, value.unsqueeze(1), is_shown[..., 0] > 0)
        return [after.log_scale, after.normalizer, after.values]

    frame = problem.log_mass.detach()
    is_empty = frame <= HIDDEN / 2
    mass = (problem.log_mass - frame).exp().masked_fill(is_empty, 0.0)
    sums = problem.average * mass.unsqueeze(-1)
    carry = [frame.masked_fill(is_empty, -torch.inf), mass, sums]
    carry = [part.unsqueeze(1) for part in carry]
    nobody = [torch.full_like(carry[0], -torch.inf), *map(torch.zeros_like, carry[1:])]

    key, value = blocks(problem.key.to(dtype) * root), blocks(problem.value.to(dtype))
    sink_key = problem.sink_key.to(dtype).unsqueeze(1) * root
    sink_value = problem.sink_value.to(dtype).unsqueeze(1)
    of_keys = [key, value, shown(problem.hidden_far)]
    near = [of_neighbors(x) for x in (key, value, shown(problem.hidden_near))]
    place = torch.arange(length, device=frame.device)
    inputs = [
        blocks(problem.query.to(dtype) * root).flatten(2, 3),
        *(torch.cat(x, dim=2) for x in near),
        blocks(place.unsqueeze(-1)).repeat(1, group, 1),
    ]
    has_heavy = problem.heavy_key.shape[2] > 0
    if has_heavy:
        is_there = ~problem.heavy_hidden.unsqueeze(2)
        heavy = problem.heavy_key.to(dtype) * root, problem.heavy_value.to(dtype), is_there
        inputs += [x.movedim(1, 0) for x in heavy]
    if has_features:
        inputs += [of_neighbors(x)[0] for x in of_keys]
        if not problem.is_causal:

            def from_the_end(
                carry: list[Tensor], block: list[Tensor]
            ) -> tuple[list[Tensor], list[Tensor]]:
                after = absorbed(carry, block)
                return after, after

            _, ends = folded(from_the_end, nobody, [x.flip(0) for x in of_keys])
            # What is far of a block begins two blocks after it.
            inputs += [
                torch.cat([x.flip(0), none.expand(2, *none.shape)])[2:]
                for x, none in zip(ends, nobody, strict=True)
            ]
    later = torch.ones(size, size, dtype=torch.bool, device=frame.device).triu(1)
    later = torch.cat([torch.zeros_like(later), later], dim=1).repeat(group, 1)

    def step(carry: list[Tensor], block: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        query, key, value, is_shown, place, *rest = [x.unsqueeze(1) for x in block]
        visible = is_shown.mT > 0
        if problem.is_causal:
            visible = visible & ~later
        masks = [place.movedim(0, 1) >= problem.sink_start[:, None, None], visible]
        exact = [(sink_key, sink_value), (key, value)]
        if has_heavy:
            heavy_key, heavy_value, is_there, *rest = rest
            masks.append(is_there)
            exact.append((heavy_key, heavy_value))
        mask = torch.cat([x.expand(-1, 1, query.shape[2], -1) for x in masks], dim=-1)
        keys, values = (torch.cat(x, dim=2) for x in zip(*exact, strict=True))
        partial = exact_partial(query, keys, values, mask)
        limits = []
        if has_features:
            log_scale, normalizer, values = carry
            far = LinearState(log_scale, normalizer, values)
            if not problem.is_causal:
                log_scale, normalizer, values = (x.squeeze(1) for x in rest[3:])
                far = far.merge(LinearState(log_scale, normalizer, values))
            estimated = read(far, query_side.log_linear(query).features())
            if problem.far_limit is not None:
                estimated, log_factor = estimated.limited(partial, problem.far_limit)
                limits.append(log_factor.detach())
            partial = partial.merge(estimated)
            carry = absorbed(carry, [x.squeeze(1) for x in rest[:3]])
        is_blind = partial.normalizer == 0
        total = partial.normalizer.masked_fill(is_blind, 1.0)
        log_sum = (total.log() + partial.frame).masked_fill(is_blind, HIDDEN)
        return carry, [x.squeeze(1) for x in (partial.numerator / total, log_sum, *limits)]

    carry, found = folded(step, carry, inputs)
    out, log_sum, *limits = (
        x.unflatten(2, (group, size)).movedim(0, 2).flatten(2, 3)[:, :, :length] for x in found
    )
    out = out.to(problem.query.dtype)
    log_factor = limits[0] if limits else log_sum[..., :0].detach()
    if not has_features:
        return BlockAttention(out, log_sum, problem.log_mass, problem.average, log_factor)
    log_scale, normalizer, values = absorbed(carry, [x[-1] for x in of_keys])
    log_scale, normalizer, values = (x.squeeze(1) for x in (log_scale, normalizer, values))
    is_empty = normalizer == 0
    total = normalizer.masked_fill(is_empty, 1.0)
    log_mass = (total.log() + log_scale).masked_fill(is_empty, HIDDEN)
    return BlockAttention(out, log_sum, log_mass, values / total.unsqueeze(-1), log_factor)


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? hidden_near, Tensor? hidden_far, "
    "Tensor sink_key, Tensor sink_value, Tensor sink_start, "
    "Tensor heavy_key, Tensor heavy_value, Tensor heavy_hidden, "
    "Tensor query_directions, Tensor? query_shift, Tensor? query_matrix, Tensor? query_linear, "
    "Tensor key_directions, Tensor? key_shift, Tensor? key_matrix, Tensor? key_linear, "
    "Tensor tilt, Tensor log_mass, Tensor average, int window_size, float scale, bool is_causal, "
    "float? far_limit"
)
NUMBERS = 4  # at the end of the schema
OUTPUTS = tuple(f"found_{name}" for name in BlockAttention._fields)  # as the way back takes them


@torch.library.custom_op(
    "performers::block_attention",
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _block_attention(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(forward(Problem(*arguments)))


@_block_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    shape = problem.query.shape[:3]
    return (
        problem.query.new_empty(*shape, problem.value.shape[-1]),
        problem.average.new_empty(*shape, 1),
        torch.empty_like(problem.log_mass),
        torch.empty_like(problem.average),
        problem.average.new_empty(*shape, _Sizes(problem).limits),
    )


@torch.library.custom_op(
    "performers::block_attention_backward",
    mutates_args=(),
    # no lists of tensors: PyTorch cannot batch those (`is_grads_batched=True`)
    schema=f"({SCHEMA}, {', '.join(f'Tensor {name}' for name in OUTPUTS)}, "
    f"{', '.join(f'Tensor {name}_gradient' for name in OUTPUTS)}, bool with_directions) "
    f"-> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
)
def _block_attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *of_problem, with_directions = arguments
    problem, outputs = Problem(*of_problem[:-10]), of_problem[-10:]
    found, gradients = BlockAttention(*outputs[:5]), BlockAttention(*outputs[5:])
    return tuple(backward(problem, found, gradients, with_directions))


@_block_attention_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[:-11])
    return tuple(torch.empty_like(getattr(problem, name)) for name in DIFFERENTIABLE)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.numbers = inputs[-NUMBERS:]
    ctx.save_for_backward(*inputs[:-NUMBERS], *output)


def _plain_gradients(
    ctx: Any, inputs: tuple[Any, ...], gradients: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients through the formula."""
    names = zip(Problem._fields, ctx.needs_input_grad, strict=True)
    needed = [need and name in DIFFERENTIABLE for name, need in names]
    return plain_gradients(plain, (*inputs, *ctx.numbers), needed, gradients)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    inputs, found = saved[:-5], saved[-5:]
    if is_differentiated():
        return _plain_gradients(ctx, inputs, gradients)
    full = [
        torch.zeros_like(x) if gradient is None else gradient
        for gradient, x in zip(gradients, found, strict=True)
    ]
    problem = Problem(*inputs, *ctx.numbers)
    places = {name: index for index, name in enumerate(Problem._fields)}
    with_directions = any(ctx.needs_input_grad[places[name]] for name in SHARED)
    found_gradients = _block_attention_backward(*problem, *found, *full, with_directions)
    result: list[Tensor | None] = [None] * len(problem)
    for name, gradient in zip(DIFFERENTIABLE, found_gradients, strict=True):
        if with_directions or name not in SHARED:
            result[places[name]] = gradient
    return tuple(result)


_block_attention.register_autograd(_differentiate, setup_context=_keep)


def block_attention(problem: Problem) -> BlockAttention:
    """What the module's docstring describes, for tensors of any device; differentiable.

    Cost per token and head: 4·dim operations per near key and sink, 8·num_features·dim for what is
    far, 4·dim² for sides with a matrix (`theory.cost.favor_operations`).
    """
    return BlockAttention(*(plain if needs_formula() else _block_attention)(*problem))
