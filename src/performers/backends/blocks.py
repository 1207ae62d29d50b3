"""Attention with a near field of blocks, forward and backward by hand, a tile of blocks at a time.

A block of queries scores the keys of its own and the neighboring blocks, and a few sinks, one by
one. It meets all other keys through the features, each of which stands for all keys of one far
block after another:

    keys       far: blocks … b−3, b−2  │ near: b−1, b, b+1 │  far: b+2, b+3 …   (causal: up to b)

    block c    s_cm = log Σ_{j in c} φ_m(k_j)         A_cm = Σ_{j in c} φ_m(k_j) e^(−s_cm) v_j
    far of b   s̃_bm = log Σ_{far c} e^(s_cm)          F_bm = Σ_{far c} e^(s_cm − s̃_bm) A_cm

A query then takes one softmax over a row of logits: q·k_j for what is near, log φ_m(q) + s̃_bm for
each feature m, with v_j and F_bm for their values. Far averages are made of whole blocks, by a scan
from the left and one from the right, so nothing that a causal query reads depends on a later key:
no bound on norms, no passes that depend on the data.

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

from performers.backends.fused_softmax import (
    HIDDEN,
    TILE_BYTES,
    _buffers,
    _refuse_second_derivative,
    _slices,
)

__all__ = ["BlockAttention", "Problem", "block_attention"]

LOG2_E = math.log2(math.e)
HEADS = 8  # that are worked on in one go, at most
# Of their rows and of the averages of all their blocks, which live during a pass only.
HEADS_BYTES = 64 * 2**20


class BlockAttention(NamedTuple):
    """Outputs, the log of their normalizers, and the averages of all blocks and of the state before
    them: s̃_m and F_m."""

    out: Float[Tensor, "heads group length value_dim"]
    log_sum: Float[Tensor, "heads group length 1"]
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]


# In what follows: heads = batch · key_heads; a block of `window_size` keys has `group` as many
# queries; near = the keys of 3 blocks, causal of 2; wide = value_dim + 1.


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


class _Averages(NamedTuple):
    """Of every block, or of what is far of it: s and A, or s̃ and F."""

    log_mass: Float[Tensor, "blocks heads num_features"]
    average: Float[Tensor, "blocks heads num_features wide"]


class _Scan(NamedTuple):
    """Blocks added up one after another: log-masses after 0, 1, 2, … of them, and the factors with
    which each step takes over what was there and the new block."""

    log_mass: Float[Tensor, "steps heads num_features"]
    kept: Float[Tensor, "blocks heads num_features 1"]
    added: Float[Tensor, "blocks heads num_features 1"]

    @classmethod
    def of(cls, first: Tensor, log_mass: Tensor) -> _Scan:
        total = torch.cat([first.unsqueeze(0), log_mass]).logcumsumexp(dim=0)
        kept, added = (total[:-1] - total[1:]).exp_(), (log_mass - total[1:]).exp_()
        return cls(total, kept.unsqueeze(-1), added.unsqueeze(-1))

    def step(self, index: int, running: Tensor, block: Tensor) -> None:
        running.mul_(self.kept[index]).addcmul_(block, self.added[index])

    def step_back(self, index: int, gradient: Tensor, of_block: Tensor) -> None:
        of_block.addcmul_(gradient, self.added[index])
        gradient.mul_(self.kept[index])


class _Merge:
    """What is far of each block: the state and the blocks before it, and those after it."""

    def __init__(self, blocks: _Averages, first: Tensor, is_causal: bool) -> None:
        count = len(blocks.log_mass)
        self.count, self.blocks, self.is_causal = count, blocks, is_causal
        place = torch.arange(count, device=first.device)
        self.before = _Scan.of(first, blocks.log_mass)
        self.log_mass = self.before.log_mass[(place - 1).clamp(min=0)]
        if not is_causal:
            nothing = torch.full_like(first, HIDDEN)
            self.after = _Scan.of(nothing, blocks.log_mass.flip(0))
            parts = self.log_mass, self.after.log_mass[(count - 2 - place).clamp(min=0)]
            self.log_mass = torch.logaddexp(*parts)
            self.shares = [(part - self.log_mass).exp_().unsqueeze(-1) for part in parts]

    def far(self, running: Tensor, far: Tensor) -> None:
        """F of each block; `running`, the average of the state before, becomes that after."""
        average = self.blocks.average
        for block in range(self.count):
            if block >= 2:
                self.before.step(block - 2, running, average[block - 2])
            if self.is_causal:
                far[block].copy_(running)
            else:
                torch.mul(running, self.shares[0][block], out=far[block])
        if self.is_causal:
            for block in range(max(0, self.count - 2), self.count):
                self.before.step(block, running, average[block])
            return
        running = torch.zeros_like(running)
        for block in reversed(range(self.count - 2)):
            self.after.step(self.count - 3 - block, running, average[block + 2])
            far[block].addcmul_(running, self.shares[1][block])

    def far_back(self, running: Tensor, of_far: Tensor, of_blocks: Tensor) -> None:
        """The gradients of the blocks' averages from those of F; `running`, that of the state
        after, becomes that of the state before."""
        if self.is_causal:
            for block in reversed(range(max(0, self.count - 2), self.count)):
                self.before.step_back(block, running, of_blocks[block])
        for block in reversed(range(self.count)):
            if self.is_causal:
                running.add_(of_far[block])
            else:
                running.addcmul_(of_far[block], self.shares[0][block])
            if block >= 2:
                self.before.step_back(block - 2, running, of_blocks[block - 2])
        if not self.is_causal:
            running = torch.zeros_like(running)
            for block in range(self.count - 2):
                running.addcmul_(of_far[block], self.shares[1][block])
                self.after.step_back(self.count - 3 - block, running, of_blocks[block + 2])


class _Side(NamedTuple):
    """What the features of queries, or of keys, are computed from, x being their rows in `_Heads`.

    log φ_m(x) = y·ω_m + number, but for the numbers of the features
    y = (x − shift) matrix,     number = (x − shift)·linear − ‖y‖²/2
    """

    directions: Float[Tensor, "#heads num_features dim"]
    shift: Float[Tensor, "#heads 1 dim"] | None
    matrix: Float[Tensor, "#heads dim dim_and_one"] | float  # the last column is `linear`

    @classmethod
    def of(
        cls,
        directions: Tensor,
        shift: Tensor | None,
        matrix: Tensor | None,
        linear: Tensor | None,
        unit: float,
    ) -> _Side:
        """For rows that are x / unit."""
        if matrix is None:
            return cls(directions, None, unit)
        return cls(directions, shift / unit, torch.cat([matrix, linear.mT], dim=-1) * unit)

    def columns(self, heads: slice, x: Float[Tensor, "heads rows dim"], out: Tensor) -> Tensor:
        """[y number], of which the product with [ω 1] is log φ; `out` has room for it."""
        y, number = out[..., :-1], out[..., -1]
        spare = _buffers.take("spare", x.shape, x)
        if isinstance(self.matrix, float):
            torch.mul(x, self.matrix, out=y)
            number.zero_()
        else:
            matrix = _of(self.matrix, heads).expand(len(x), -1, -1)
            torch.bmm(torch.sub(x, _of(self.shift, heads), out=spare), matrix, out=out)
        number.sub_(torch.mul(y, y, out=spare).sum(dim=-1), alpha=0.5)
        return out

    def columns_back(
        self, heads: slice, columns: Tensor, of_columns: Tensor
    ) -> Float[Tensor, "heads rows dim"]:
        """The gradient of x from that of [y number]; the latter is lost."""
        of_y = of_columns[..., :-1]
        of_y.addcmul_(columns[..., :-1], of_columns[..., -1:], value=-1)
        if isinstance(self.matrix, float):
            return of_y.mul_(self.matrix)
        matrix = _of(self.matrix, heads).expand(len(columns), -1, -1)
        spare = _buffers.take("spare", of_y.shape, of_y)
        return torch.bmm(of_columns, matrix.mT, out=spare)


def _of(x: Float[Tensor, "#heads *_"], heads: slice) -> Tensor:
    """What belongs to some heads, or to all alike."""
    return x[heads] if len(x) > 1 else x


class _Sizes:
    """Sizes of a problem, and of what is done at a time."""

    def __init__(self, problem: Problem) -> None:
        self.heads, self.group, self.length, self.dim = problem.query.shape
        self.value_dim, self.features = problem.average.shape[-1], problem.average.shape[-2]
        self.block, self.sinks = min(problem.window_size, self.length), problem.sink_key.shape[1]
        self.count = -(-self.length // self.block)
        self.rows = self.group * self.block
        self.before = int(self.count > 1)  # blocks that are near beside a query's own
        self.after = 0 if problem.is_causal else self.before
        self.near = (1 + self.before + self.after) * self.block
        self.columns = self.near + self.sinks + self.features
        size = problem.average.element_size()
        self.tile = max(1, min(self.count, TILE_BYTES // (self.rows * self.columns * size)))
        averages = 4 * self.count * self.features * (self.value_dim + 1)
        rows = self.count * self.block * 3 * (self.group + 2) * (self.dim + 1)
        self.at_once = max(1, min(HEADS, HEADS_BYTES // (size * (averages + rows))))

    def head_groups(self) -> Iterator[slice]:
        return _slices(self.heads, self.at_once)

    def tiles(self) -> Iterator[slice]:
        return _slices(self.count, self.tile)


class _Heads:
    """Some heads: their rows in blocks, 0 beyond the last, and what one tile of blocks takes.

    `key` and `value` begin with a block of nothing, and end with one unless causal, so that what is
    near of each block are rows that follow each other.
    """

    def __init__(self, problem: Problem, sizes: _Sizes, heads: slice) -> None:
        self.problem, self.sizes, self.heads = problem, sizes, heads
        self.like = problem.average
        self.root = math.sqrt(problem.scale)
        number = heads.stop - heads.start
        blocks = sizes.count + sizes.before + sizes.after
        self.query = self.take(
            "query", number, sizes.count, sizes.group, sizes.block, sizes.dim + 1
        )
        self.key = self.take("key", number, blocks * sizes.block, sizes.dim + 1)
        self.value = self.take("value", number, blocks * sizes.block, sizes.value_dim)
        self.put(problem.query[heads], self.query[..., :-1], self.root)
        self.query[..., -1] = 1.0
        start = sizes.before * sizes.block
        self.own = own = slice(start, start + sizes.length)  # of these rows, the real ones
        for whole, x, factor in (
            (self.key[..., :-1], problem.key, self.root * LOG2_E),
            (self.value, problem.value, 1.0),
        ):
            whole[:, : own.start].zero_()
            torch.mul(x[heads], factor, out=whole[:, own])
            whole[:, own.stop :].zero_()
        self.set_numbers(self.key[..., -1], problem.hidden_near, own)
        self.sink_key = problem.sink_key[heads].to(self.like) * (self.root * LOG2_E)
        self.sink_value = problem.sink_value[heads].to(self.like)
        query = problem.query_directions, problem.query_shift, problem.query_matrix
        key = problem.key_directions, problem.key_shift, problem.key_matrix
        self.query_side = _Side.of(*query, problem.query_linear, unit=1.0)
        self.key_side = _Side.of(*key, problem.key_linear, unit=1 / LOG2_E)
        rows = self.query.flatten(1, 3)
        out = self.take("query columns", *rows.shape)
        self.query_columns = self.query_side.columns(heads, rows[..., :-1], out)
        out = self.take("key columns", number, sizes.count * sizes.block, sizes.dim + 1)
        rows = self.key[:, own.start : own.start + out.shape[1], :-1]
        self.key_columns = self.key_side.columns(heads, rows, out)
        numbers = self.take("numbers", *out.shape[:2])
        self.set_numbers(numbers, problem.hidden_far, slice(0, sizes.length))
        self.key_columns[..., -1] += numbers
        later = torch.ones(sizes.block, sizes.block, dtype=torch.bool, device=self.like.device)
        self.later = later.triu_(1)

    def put(self, x: Tensor, blocks: Tensor, factor: float = 1.0) -> None:
        """Rows [heads, group, length, ·] times a factor into [heads, count, group, block, ·]."""
        for part, rows in self.paired(x, blocks):
            torch.mul(part, factor, out=rows)
        rest = self.sizes.length % self.sizes.block
        if rest:
            blocks[:, -1, :, rest:].zero_()

    def paired(self, x: Tensor, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same rows of both: those of whole blocks, and those of the last that is not whole."""
        whole, rest = divmod(self.sizes.length, self.sizes.block)
        stop = whole * self.sizes.block
        yield x[:, :, :stop].unflatten(2, (whole, -1)).transpose(1, 2), blocks[:, :whole]
        if rest:
            yield x[:, :, stop:], blocks[:, whole, :, :rest]

    def set_numbers(self, out: Tensor, hidden: Tensor | None, real: slice) -> None:
        """What is added to the logits of keys: 0, or HIDDEN where there is none to be seen."""
        out.fill_(HIDDEN)
        out[:, real] = 0.0
        if hidden is not None:
            out[:, real].masked_fill_(hidden[self.heads], HIDDEN)

    def take(self, name: str, *shape: int) -> Tensor:
        return _buffers.take(name, shape, self.like)

    def near(self, rows: Float[Tensor, "rows width"], tile: slice) -> Tensor:
        """Of rows of keys those near each block of a tile, [blocks, near, width]: a view."""
        width, size = rows.shape[1], self.sizes.block
        return rows[tile.start * size :].as_strided(
            (tile.stop - tile.start, self.sizes.near, width), (size * width, width, 1)
        )

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The columns of near keys, of sinks and of features."""
        sizes = self.sizes
        near, sinks, features = x.split([sizes.near, sizes.sinks, sizes.features], dim=-1)
        return near, sinks, features

    def columns_of(self, directions: Tensor, index: int) -> Float[Tensor, "features dim_and_one"]:
        """[ω 1] of one head, for logits in base e."""
        one = directions[self.heads.start + index if len(directions) > 1 else 0]
        return F.pad(one, (0, 1), value=1.0)

    def key_logits(self, index: int, columns_2: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
        """log₂ φ of the keys of a tile, [blocks, block, features], and their values."""
        size = self.sizes.block
        rows = slice(tile.start * size, tile.stop * size)
        columns = self.key_columns[index, rows]
        logits = self.take("key logits", len(columns), len(columns_2))
        torch.mm(columns, columns_2.mT, out=logits)
        shift = self.sizes.before * size
        value = self.value[index, rows.start + shift : rows.stop + shift]
        return logits.unflatten(0, (-1, size)), value.unflatten(0, (-1, size))

    def block_averages(self) -> _Averages:
        """s and A of every block."""
        sizes = self.sizes
        shape = sizes.count, len(self.query), sizes.features
        log_mass = self.take("block mass", *shape)
        average = self.take("block average", *shape, sizes.value_dim)
        for index in range(len(self.query)):
            columns_2 = self.columns_of(self.key_side.directions, index) * LOG2_E
            for tile in sizes.tiles():
                weights, value = self.key_logits(index, columns_2, tile)
                largest = weights.amax(dim=1, keepdim=True)
                total = weights.sub_(largest).exp2_().sum(dim=1, keepdim=True)
                torch.bmm(weights.mT, value, out=average[tile, index]).div_(total.mT)
                torch.add(largest, total.log2_(), out=log_mass[tile, index].unsqueeze(1))
        log_mass.div_(LOG2_E)
        return _Averages(log_mass, average)

    def far_averages(self, blocks: _Averages) -> tuple[_Merge, _Averages, Tensor]:
        """s̃ and F of every block, and F after the last."""
        problem = self.problem
        merge = _Merge(blocks, problem.log_mass[self.heads], problem.is_causal)
        running = problem.average[self.heads].clone()
        average = self.take("far average", *blocks.average.shape)
        merge.far(running, average)
        return merge, _Averages(merge.log_mass, average), running

    def row_logits(self, index: int, columns_2: Tensor, tile: slice, far: _Averages) -> Tensor:
        """What the queries of a tile score, in base 2, [blocks, rows, columns].

        `far.log_mass` has the numbers of the features in it, in base 2."""
        sizes, problem = self.sizes, self.problem
        blocks = tile.stop - tile.start
        query = self.query[index, tile].flatten(1, 2)
        logits = self.take("row logits", blocks, sizes.rows, sizes.columns)
        near, sinks, features = self.parts(logits)
        torch.bmm(query, self.near(self.key[index], tile).mT, out=near)
        if problem.is_causal:
            own = near[..., sizes.before * sizes.block :].unflatten(1, (sizes.group, sizes.block))
            own.masked_fill_(self.later, HIDDEN)
        if sizes.sinks:
            rows = query.flatten(0, 1)[:, :-1]
            torch.mm(rows, self.sink_key[index].mT, out=sinks.flatten(0, 1))
            place = torch.arange(
                tile.start * sizes.block, tile.stop * sizes.block, device=rows.device
            )
            unseen = place[:, None] < problem.sink_start[self.heads.start + index]
            unseen = unseen.unflatten(0, (blocks, 1, sizes.block))
            sinks.unflatten(1, (sizes.group, sizes.block)).masked_fill_(unseen, HIDDEN)
        if sizes.features:
            rows = slice(tile.start * sizes.rows, tile.stop * sizes.rows)
            torch.mm(self.query_columns[index, rows], columns_2.mT, out=features.flatten(0, 1))
            features.add_(far.log_mass[tile, index].unsqueeze(1))
        return logits

    def with_numbers(self, far: _Averages) -> _Averages:
        """F, and s̃ with the numbers of the features, in base 2."""
        tilt = _of(self.problem.tilt, self.heads).squeeze(1)
        return _Averages((far.log_mass + tilt) * LOG2_E, far.average)

    def attend(self, far: _Averages) -> tuple[Tensor, Tensor]:
        """Outputs and the logs of their normalizers, [heads, count, group, block, ·]."""
        sizes = self.sizes
        shape = self.query.shape[:-1]
        out, log_sum = self.take("out", *shape, sizes.value_dim), self.take("log sum", *shape, 1)
        far = self.with_numbers(far)
        for index in range(len(self.query)):
            columns_2 = self.columns_of(self.query_side.directions, index) * LOG2_E
            for tile in sizes.tiles():
                weights = self.row_logits(index, columns_2, tile, far)
                largest = weights.amax(dim=-1, keepdim=True)
                total = weights.sub_(largest).exp2_().sum(dim=-1, keepdim=True)
                near, sinks, features = self.parts(weights)
                found = out[index, tile].flatten(1, 2)
                torch.bmm(near, self.near(self.value[index], tile), out=found)
                if sizes.features:
                    found.baddbmm_(features, far.average[tile, index])
                if sizes.sinks:
                    found.flatten(0, 1).addmm_(sinks.flatten(0, 1), self.sink_value[index])
                found.div_(total)
                torch.add(largest, total.log2_(), out=log_sum[index, tile].flatten(1, 2))
        return out, log_sum.div_(LOG2_E)


class _Backward(_Heads):
    """Some heads on the way back: the gradients of all that `_Heads` has of them.

    The gradient of a logit is w (dO·v − e): w its weight, e what all logits of its softmax lose.
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
        shape = self.query.shape[:-1]
        self.of_out = self.take("of out", *shape, sizes.value_dim)
        self.put(gradients.out[heads], self.of_out)
        self.log_sum, self.excess = self.take("log sum", *shape, 1), self.take("excess", *shape, 1)
        self.put(found.log_sum[heads], self.log_sum, LOG2_E)
        excess = (gradients.out[heads] * found.out[heads]).sum(dim=-1, keepdim=True)
        self.put(excess - gradients.log_sum[heads], self.excess)
        self.of_query = self.take("of query", *self.query.shape)
        self.of_key = self.take("of key", *self.key.shape).zero_()
        self.of_value = self.take("of value", *self.value.shape).zero_()
        self.of_query_columns = self.take("of query columns", *self.query_columns.shape)
        self.of_key_columns = self.take("of key columns", *self.key_columns.shape)
        self.of_sink_key = torch.zeros_like(self.sink_key)
        self.of_sink_value = torch.zeros_like(self.sink_value)
        directions = len(self.query), sizes.features if with_directions else 0, sizes.dim
        self.of_query_directions = self.like.new_zeros(directions)
        self.of_key_directions = self.like.new_zeros(directions)

    def rows_back(self, far: _Averages) -> Float[Tensor, "blocks heads num_features wide"]:
        """Back through the rows' softmaxes, to [dF, e]: e is what s̃ loses by each of its blocks."""
        sizes = self.sizes
        of_far = self.take("of far", *far.average.shape[:-1], sizes.value_dim + 1)
        of_average, excess = of_far[..., :-1], of_far[..., -1]
        columns_of_far = self.with_numbers(far)
        for index in range(len(self.query)):
            columns = self.columns_of(self.query_side.directions, index)
            near_of_key, near_of_value = self.of_key[index], self.of_value[index]
            for tile in sizes.tiles():
                query, of_query, of_out, log_sum, lost = (
                    x[index, tile].flatten(1, 2)
                    for x in (self.query, self.of_query, self.of_out, self.log_sum, self.excess)
                )
                weights = self.row_logits(index, columns * LOG2_E, tile, columns_of_far)
                # ≤ 0, but for the rounding of very large numbers
                weights.sub_(log_sum).clamp_(max=0).exp2_()
                of_logits = self.take("of row logits", *weights.shape)
                for_near, for_sinks, for_features = self.parts(of_logits)
                torch.bmm(of_out, self.near(self.value[index], tile).mT, out=for_near)
                if sizes.sinks:
                    rows = of_out.flatten(0, 1)
                    torch.mm(rows, self.sink_value[index].mT, out=for_sinks.flatten(0, 1))
                if sizes.features:
                    torch.bmm(of_out, far.average[tile, index].mT, out=for_features)
                of_logits.sub_(lost).mul_(weights)

                near, sinks, features = self.parts(weights)
                self.add_near(near_of_value, tile, near, of_out)
                self.add_near(near_of_key, tile, for_near, query, 1 / LOG2_E)
                near_key = self.near(self.key[index], tile)
                torch.baddbmm(of_query, for_near, near_key, beta=0, alpha=1 / LOG2_E, out=of_query)
                if sizes.sinks:
                    sinks, for_sinks = sinks.flatten(0, 1), for_sinks.flatten(0, 1)
                    self.of_sink_value[index].addmm_(sinks.mT, of_out.flatten(0, 1))
                    rows = query.flatten(0, 1)[:, :-1]
                    self.of_sink_key[index].addmm_(for_sinks.mT, rows, alpha=1 / LOG2_E)
                    rows = of_query.flatten(0, 1)[:, :-1]
                    rows.addmm_(for_sinks, self.sink_key[index], alpha=1 / LOG2_E)
                if sizes.features:
                    torch.bmm(features.mT, of_out, out=of_average[tile, index])
                    torch.sum(for_features, dim=1, out=excess[tile, index])
                    rows = slice(tile.start * sizes.rows, tile.stop * sizes.rows)
                    for_features = for_features.flatten(0, 1)
                    torch.mm(for_features, columns, out=self.of_query_columns[index, rows])
                    if self.of_query_directions.numel():
                        y = self.query_columns[index, rows, :-1]
                        self.of_query_directions[index].addmm_(for_features.mT, y)
        self.of_numbers = excess.sum(dim=0)
        torch.sub((of_average * far.average).sum(dim=-1), excess, out=excess)
        if sizes.features:
            columns, of_columns = self.query_columns, self.of_query_columns
            of_x = self.query_side.columns_back(self.heads, columns, of_columns)
            self.of_query[..., :-1] += of_x.view_as(self.query[..., :-1])
        return of_far

    def add_near(
        self, of_rows: Tensor, tile: slice, weights: Tensor, x: Tensor, factor: float = 1.0
    ) -> None:
        """Add weightsᵀ x to the keys that are near each block."""
        size = self.sizes.block
        part = self.take("of near", len(x), self.sizes.near, x.shape[-1])
        torch.bmm(weights.mT, x, out=part)
        rows = of_rows[tile.start * size :]
        for start in range(0, self.sizes.near, size):
            there = rows[start : start + len(x) * size].view(len(x), size, -1)
            there.add_(part[:, start : start + size], alpha=factor)

    def keys_back(self, blocks: _Averages, of_blocks: Tensor) -> None:
        """Back through the averages of blocks."""
        sizes = self.sizes
        log_mass = (blocks.log_mass * LOG2_E).unsqueeze(2)
        for index in range(len(self.query)):
            columns = self.columns_of(self.key_side.directions, index)
            for tile in sizes.tiles():
                of_average, lost = of_blocks[tile, index, :, :-1], of_blocks[tile, index, :, -1]
                weights, value = self.key_logits(index, columns * LOG2_E, tile)
                weights.sub_(log_mass[tile, index]).clamp_(max=0).exp2_()
                rows = slice(tile.start * sizes.block, tile.stop * sizes.block)
                shift = sizes.before * sizes.block
                own = self.of_value[index, rows.start + shift : rows.stop + shift]
                own.view_as(value).baddbmm_(weights, of_average)
                of_logits = self.take("of key logits", *weights.shape)
                torch.bmm(value, of_average.mT, out=of_logits)
                of_logits = of_logits.sub_(lost.unsqueeze(1)).mul_(weights).flatten(0, 1)
                torch.mm(of_logits, columns, out=self.of_key_columns[index, rows])
                if self.of_key_directions.numel():
                    y = self.key_columns[index, rows, :-1]
                    self.of_key_directions[index].addmm_(of_logits.mT, y)
        of_x = self.key_side.columns_back(self.heads, self.key_columns, self.of_key_columns)
        shift = sizes.before * sizes.block
        self.of_key[:, shift : shift + of_x.shape[1], :-1] += of_x


def forward(problem: Problem) -> BlockAttention:
    """Attention of all heads."""
    sizes = _Sizes(problem)
    out = problem.query.new_empty(*problem.query.shape[:3], sizes.value_dim)
    log_sum = problem.average.new_empty(*problem.query.shape[:3], 1)
    log_mass, average = torch.empty_like(problem.log_mass), torch.empty_like(problem.average)
    for heads in sizes.head_groups():
        work = _Heads(problem, sizes, heads)
        merge, far, average[heads] = work.far_averages(work.block_averages())
        log_mass[heads] = merge.before.log_mass[-1]
        for x, blocks in zip((out, log_sum), work.attend(far), strict=True):
            for part, rows in work.paired(x[heads], blocks):
                part.copy_(rows)
    return BlockAttention(out, log_sum, log_mass, average)


# The arguments that have a gradient, in the order of `Problem`.
DIFFERENTIABLE = (
    "query", "key", "value", "sink_key", "sink_value",
    "query_directions", "key_directions", "tilt", "log_mass", "average",
)  # fmt: skip


def backward(
    problem: Problem, found: BlockAttention, gradients: BlockAttention, with_directions: bool
) -> list[Tensor]:
    """The gradients of what is `DIFFERENTIABLE`; those of directions are empty unless asked for."""
    sizes = _Sizes(problem)
    of = {name: torch.zeros_like(getattr(problem, name)) for name in DIFFERENTIABLE}
    if not with_directions:
        of |= {f"{side}_directions": problem.query.new_empty(0) for side in ("query", "key")}
    for heads in sizes.head_groups():
        work = _Backward(problem, sizes, heads, found, gradients, with_directions)
        blocks = work.block_averages()
        merge, far, last = work.far_averages(blocks)
        of_far = work.rows_back(far)

        of_last = gradients.average[heads]
        lost = (of_last * last).sum(dim=-1) - gradients.log_mass[heads]
        running = torch.cat([of_last, lost.unsqueeze(-1)], dim=-1)
        of_blocks = work.take("of blocks", *of_far.shape).zero_()
        merge.far_back(running, of_far, of_blocks)
        of["average"][heads] = running[..., :-1]
        along = (running[..., :-1] * problem.average[heads]).sum(dim=-1)
        of["log_mass"][heads] = along - running[..., -1]
        if sizes.features:
            work.keys_back(blocks, of_blocks)

        root, own = work.root, work.own
        for part, rows in work.paired(of["query"][heads], work.of_query[..., :-1]):
            torch.mul(rows, root, out=part)
        torch.mul(work.of_key[:, own, :-1], root * LOG2_E, out=of["key"][heads])
        of["value"][heads] = work.of_value[:, own]
        of["sink_key"][heads] = work.of_sink_key * (root * LOG2_E)
        of["sink_value"][heads] = work.of_sink_value
        for name, part in (
            ("query_directions", work.of_query_directions),
            ("key_directions", work.of_key_directions),
            ("tilt", work.of_numbers.unsqueeze(1)),
        ):
            if of[name].numel():
                whole = of[name]
                whole[heads if len(whole) > 1 else slice(None)] += (
                    part if len(whole) > 1 else part.sum(dim=0, keepdim=True)
                )
    return list(of.values())


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? hidden_near, Tensor? hidden_far, "
    "Tensor sink_key, Tensor sink_value, Tensor sink_start, "
    "Tensor query_directions, Tensor? query_shift, Tensor? query_matrix, Tensor? query_linear, "
    "Tensor key_directions, Tensor? key_shift, Tensor? key_matrix, Tensor? key_linear, "
    "Tensor tilt, Tensor log_mass, Tensor average, int window_size, float scale, bool is_causal"
)


@torch.library.custom_op(
    "performers::block_attention",
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
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
    )


@torch.library.custom_op(
    "performers::block_attention_backward",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor[] found, Tensor[] gradients, bool with_directions) -> Tensor[]",
)
def _block_attention_backward(*arguments: Any) -> list[Tensor]:
    *arguments, found, gradients, with_directions = arguments
    problem = Problem(*arguments)
    return backward(problem, BlockAttention(*found), BlockAttention(*gradients), with_directions)


@_block_attention_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *arguments, _, _, with_directions = arguments
    problem = Problem(*arguments)
    return [
        problem.query.new_empty(0)
        if name.endswith("directions") and not with_directions
        else torch.empty_like(getattr(problem, name))
        for name in DIFFERENTIABLE
    ]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = inputs[-3:]
    ctx.save_for_backward(*inputs[:-3], *output)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    inputs, found = saved[:-4], saved[-4:]
    full = [
        torch.zeros_like(x) if gradient is None else gradient
        for gradient, x in zip(gradients, found, strict=True)
    ]
    problem = Problem(*inputs, *ctx.numbers)
    places = {name: index for index, name in enumerate(Problem._fields)}
    with_directions = any(ctx.needs_input_grad[places[f"{x}_directions"]] for x in ("query", "key"))
    found_gradients = _block_attention_backward(*problem, list(found), full, with_directions)
    result: list[Tensor | None] = [None] * len(problem)
    for name, gradient in zip(DIFFERENTIABLE, found_gradients, strict=True):
        if with_directions or not name.endswith("directions"):
            result[places[name]] = gradient
    return tuple(result)


_block_attention.register_autograd(_differentiate, setup_context=_keep)
_block_attention_backward.register_autograd(_refuse_second_derivative)


def block_attention(problem: Problem) -> BlockAttention:
    return BlockAttention(*_block_attention(*problem))
