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

Each of these is exact attention of many short rows, which `exact` computes: of the queries of a
block to what is near, to sinks, to heavy keys, and to its features, with s̃ and F; and of every
feature to the keys of a block, whose normalizer is s and whose output is A. The shares of the parts
in a row come from their normalizers.

The backward pass computes averages again: training keeps inputs, outputs and normalizers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends import exact
from performers.backends.buffers import CAPABILITIES, buffers, slices
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients
from performers.backends.fused_softmax import HIDDEN
from performers.backends.graphs import folded, is_exporting
from performers.backends.reference import absorb, exact_partial, read
from performers.state import LinearState
from performers.typing import LogLinearSide

__all__ = ["BlockAttention", "Problem", "block_attention"]

TILE_BYTES = 16 * 2**20  # what the products of a tile of blocks take
CACHE_BYTES = 2 * (CAPABILITIES.get("l2_cache_size") or 2**20)
HEADS = 8  # that are worked on in one go, at most
# Of their rows and of the averages of all their blocks, which live during a pass only.
HEADS_BYTES = 64 * 2**20


class BlockAttention(NamedTuple):
    """Outputs, the log of their normalizers, the averages of all blocks and of the state before
    them (s̃_m and F_m), and the log-sums of features, which the way back goes on from.
    """

    out: Float[Tensor, "heads group length value_dim"]
    log_sum: Float[Tensor, "heads group length 1"]
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]
    # of features alone, less the numbers of rows and blocks; none without features
    far_log_sum: Float[Tensor, "heads group length _"]


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
    """Of every block, or of what is far of it: s and A, or s̃ and F."""

    log_mass: Float[Tensor, "heads blocks num_features"]
    average: Float[Tensor, "heads blocks num_features width"]


class _Scan:
    """Blocks added up one after another: log-masses after 0, 1, 2, … of them, and the share of each
    in what there is with it; `kept` is that of what was there."""

    def __init__(self, first: Tensor, log_mass: Float[Tensor, "heads blocks num_features"]) -> None:
        total = torch.cat([first.unsqueeze(1), log_mass], dim=1).logcumsumexp(dim=1)
        self.log_mass = total
        self.kept = (total[:, :-1] - total[:, 1:]).exp_().unsqueeze(-1).unbind(1)
        self.added = (log_mass - total[:, 1:]).exp_().unsqueeze(-1).unbind(1)

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
            self.shares = [(part - self.log_mass).exp_().unsqueeze(-1).unbind(1) for part in parts]

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
        """The same way back, for gradients of averages and what goes with them; `of_blocks` begins
        as 0. The gradient of the first."""
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
    """What the features of queries, or of keys, are computed from, x being scaled rows.

    log φ_m(x) = y·ω_m + number, but for the numbers of the features
    y = (x − shift) matrix,     number = (x − shift)·linear − ‖y‖²/2
    """

    directions: Float[Tensor, "#heads num_features dim"]
    shift: Float[Tensor, "#heads 1 dim"] | None
    matrix: Float[Tensor, "#heads dim dim"] | None
    linear: Float[Tensor, "#heads 1 dim"] | None

    @property
    def is_plain(self) -> bool:
        """Whether y is x."""
        return self.shift is None and self.matrix is None

    def mapped(self, heads: slice, x: Tensor, y: Tensor, number: Tensor) -> None:
        """Write y, [heads, rows, dim], which may be x, and number, [heads, rows], so many rows at
        a time that they stay in the cache."""
        size = CACHE_BYTES // (4 * len(x) * x.shape[2] * x.element_size())
        for rows in slices(x.shape[1], max(64, size)):
            part, of_part, of_number = x[:, rows], y[:, rows], number[:, rows]
            spare = buffers.take("spare", part.shape, x)
            if self.shift is not None:
                centered = buffers.take("centered", part.shape, x)
                part = torch.sub(part, _of(self.shift, heads), out=centered)
            if self.matrix is not None:
                torch.bmm(part, _of(self.matrix, heads).expand(len(x), -1, -1), out=spare)
                of_part.copy_(spare)
            elif self.shift is not None:
                of_part.copy_(part)
            torch.sum(torch.mul(of_part, of_part, out=spare), dim=-1, out=of_number).mul_(-0.5)
            if self.linear is not None:
                of_number.add_((part @ _of(self.linear, heads).mT).squeeze(-1))

    def mapped_back(
        self, heads: slice, y: Tensor, of_y: Tensor, of_number: Tensor, of_x: Tensor
    ) -> None:
        """Add the gradient of x to `of_x`; that of y is lost."""
        of_y.addcmul_(y, of_number, value=-1)
        if self.matrix is None:
            of_x.add_(of_y)
        else:
            of_x.baddbmm_(of_y, _of(self.matrix, heads).expand(len(y), -1, -1).mT)
        if self.linear is not None:
            of_x.addcmul_(of_number, _of(self.linear, heads))


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
        self.width = -(-max(self.dim + 3, self.value_dim + 2) // 8) * 8
        self.block, self.sinks = min(problem.window_size, self.length), problem.sink_key.shape[1]
        self.heavy = problem.heavy_key.shape[2]
        self.num_far = min(1, self.features)  # numbers of a row that its features have
        self.count = -(-self.length // self.block)
        self.rows = self.group * self.block
        self.before = int(self.count > 1)  # blocks that are near beside a query's own
        self.after = 0 if problem.is_causal else self.before
        self.near = (1 + self.before + self.after) * self.block
        row = self.width * problem.average.element_size()
        taken = 2 * (self.near + self.heavy + self.features) + 4 * self.rows
        self.tile = max(1, min(self.count, TILE_BYTES // (taken * row)))
        rows = self.block * 3 * (self.group + 2) + 4 * self.features
        self.at_once = max(1, min(HEADS, HEADS_BYTES // (self.count * rows * row)))

    def head_groups(self) -> Iterator[slice]:
        return slices(self.heads, self.at_once)

    def tiles(self) -> Iterator[slice]:
        return slices(self.count, self.tile)


class _Part(NamedTuple):
    """What the queries of a tile of blocks attend to, as `exact.attend` takes it."""

    query: Float[Tensor, "blocks rows width"]
    key: Float[Tensor, "blocks keys width"]
    value: Float[Tensor, "blocks keys width"]
    mask: Float[Tensor, "#blocks rows keys"] | None = None


class _Heads:
    """Some heads: their rows in blocks, 0 beyond the last.

    `key` and `value` begin with a block of nothing, and end with one unless causal, so that what is
    near of each block are rows that follow each other. Rows are wider than `dim`: the columns that
    follow carry, through the products, what is added to logits and what is summed over them.

        column      dim               dim + 1            dim + 2
        query       1                 0                  0
        key         0, or HIDDEN      number             0         the same rows, near and as y
        ω as key    s̃ + numbers       0                  1         its product: d number of queries
        ω as query  0                 1                  0         its product: d number of keys

    Numbers are less the largest of their block, `key_shift` and `far_shift`, so that they are
    about as large as products.
    """

    def __init__(self, problem: Problem, sizes: _Sizes, heads: slice) -> None:
        self.problem, self.sizes, self.heads = problem, sizes, heads
        self.like = problem.average
        self.root = math.sqrt(problem.scale)
        self.number = number = heads.stop - heads.start
        dim, count, block = sizes.dim, sizes.count, sizes.block
        start = sizes.before * block
        length = (count + sizes.before + sizes.after) * block
        self.own = own = slice(start, start + sizes.length)  # of rows of keys, the real ones
        self.query = self.take("query", number, count, sizes.rows, sizes.width)
        self.put(problem.query[heads], self.query, self.root)
        self.query[..., dim] = 1.0
        self.key = self.take("key", number, length, sizes.width)
        self.value = self.take("value", number, length, sizes.width)
        for whole, x, factor in (
            (self.key, problem.key, self.root),
            (self.value, problem.value, 1.0),
        ):
            whole[:, : own.start].zero_()
            _scaled(x[heads], factor, whole[:, own, : x.shape[-1]])
            whole[:, own, x.shape[-1] :].zero_()
            whole[:, own.stop :].zero_()
        self.key[:, : own.start, dim] = self.key[:, own.stop :, dim] = HIDDEN
        if problem.hidden_near is not None:
            self.hide(self.key[:, own], problem.hidden_near[heads])
        self.sink_key = self.wide(problem.sink_key, self.root)
        self.sink_value = self.wide(problem.sink_value)
        self.heavy_key = self.wide(problem.heavy_key, self.root)
        self.hide(self.heavy_key, problem.heavy_hidden[heads])
        self.heavy_value = self.wide(problem.heavy_value)
        self.near_mask = None
        if problem.is_causal:
            later = torch.ones(block, block, dtype=torch.bool, device=self.like.device).triu_(1)
            mask = self.like.new_zeros(block, sizes.near)
            mask[:, start:].masked_fill_(later, -torch.inf)
            self.near_mask = mask.repeat(sizes.group, 1).unsqueeze(0)
        self.query_side, self.key_side = (
            _Side(*(getattr(problem, f"{side}_{part}") for part in _Side._fields))
            for side in ("query", "key")
        )
        if sizes.features:
            self.query_y, self.query_number = self.mapped("query", self.query_side, self.query)
            rows = self.key[:, start : start + count * block].unflatten(1, (count, block))
            self.key_y, key_number = self.mapped("key", self.key_side, rows)
            numbers = key_number.flatten(1)
            numbers[:, sizes.length :] = HIDDEN
            if problem.hidden_far is not None:
                numbers[:, : sizes.length].masked_fill_(problem.hidden_far[heads], HIDDEN)
            self.key_shift = key_number.amax(dim=-1, keepdim=True)
            torch.sub(key_number, self.key_shift, out=self.key_y[..., dim + 1])
            self.far_key = self.take("features as keys", sizes.tile, sizes.features, sizes.width)
            self.far_key.zero_()[..., dim + 2] = 1.0

    def take(self, name: str, *shape: int) -> Tensor:
        return buffers.take(name, shape, self.like)

    def wide(self, x: Float[Tensor, "all *keys dim"], factor: float = 1.0) -> Tensor:
        """Rows of these heads times a factor, with columns of 0."""
        x = x[self.heads].to(self.like)
        return F.pad(x * factor, (0, self.sizes.width - x.shape[-1]))

    def hide(
        self, key: Float[Tensor, "heads *rows width"], hidden: Bool[Tensor, "#heads *rows"]
    ) -> None:
        """Let no query see these keys."""
        key.masked_fill_(hidden.unsqueeze(-1), 0.0)
        key[..., self.sizes.dim].masked_fill_(hidden, HIDDEN)

    def put(self, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """[heads, group, length, ·] times a factor into [heads, count, rows, width], 0 beyond."""
        dim = x.shape[-1]
        for part, there in self.paired(x, rows):
            _scaled(part, factor, there[..., :dim])
        rows[..., dim:].zero_()
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

    def mapped(
        self, name: str, side: _Side, x: Float[Tensor, "heads blocks rows width"]
    ) -> tuple[Tensor, Tensor]:
        """y as rows like x, or x itself, and number, [heads, blocks, rows]."""
        y = x
        if not side.is_plain:
            y = self.take(f"{name} y", *x.shape)
            y[..., self.sizes.dim :] = x[..., self.sizes.dim :]
        number = self.take(f"{name} number", *x.shape[:3])
        flat_x, flat_y = (rows.flatten(1, 2)[..., : self.sizes.dim] for rows in (x, y))
        side.mapped(self.heads, flat_x, flat_y, number.flatten(1, 2))
        return y, number

    def windows(self, rows: Float[Tensor, "rows width"], tile: slice) -> Tensor:
        """Of rows of keys, those near each block: a view, [blocks, near, width]."""
        size, row = self.sizes.block, rows.stride(0)
        shape = tile.stop - tile.start, self.sizes.near, rows.shape[1]
        return rows[tile.start * size :].as_strided(shape, (size * row, row, rows.stride(1)))

    def directions(self, side: _Side, index: int) -> Float[Tensor, "features dim"]:
        """ω of one head."""
        return side.directions[self.heads.start + index if len(side.directions) > 1 else 0]

    def keys_of_features(self, index: int, tile: slice) -> _Part:
        """What makes the averages of blocks: every feature attends to the keys of each."""
        sizes = self.sizes
        query = self.take("features as queries", sizes.features, sizes.width)
        query.zero_()[:, : sizes.dim] = self.directions(self.key_side, index)
        query[:, sizes.dim + 1] = 1.0
        start = (tile.start + sizes.before) * sizes.block
        rows = slice(start, start + (tile.stop - tile.start) * sizes.block)
        value = self.value[index, rows].unflatten(0, (-1, sizes.block))
        return _Part(query.expand(len(value), -1, -1), self.key_y[index, tile], value)

    def block_averages(self) -> tuple[_Averages, Tensor]:
        """s and A of every block, and s less `key_shift`."""
        sizes = self.sizes
        shape = self.number, sizes.count, sizes.features
        log_sum = self.take("block log sum", *shape)
        average = self.take("block average", *shape, sizes.width)
        if not sizes.features:
            return _Averages(log_sum, average), log_sum
        for index in range(self.number):
            for tile in sizes.tiles():
                found = exact.attend(*self.keys_of_features(index, tile))
                average[index, tile], log_sum[index, tile] = found
        return _Averages(log_sum + self.key_shift, average), log_sum

    def far_averages(self, blocks: _Averages) -> tuple[_Merge, Tensor, Tensor]:
        """F of every block, and F after the last; sets the numbers of features."""
        problem, sizes = self.problem, self.sizes
        merge = _Merge(blocks.log_mass, problem.log_mass[self.heads], problem.is_causal)
        average = self.take("far average", *blocks.average.shape)
        last = merge.far(self.wide(problem.average), blocks.average, average)
        if sizes.features:
            numbers = merge.log_mass + _of(problem.tilt, self.heads)
            self.far_shift = numbers.amax(dim=-1, keepdim=True)
            self.far_numbers = numbers - self.far_shift
        return merge, average, last

    def parts(self, index: int, tile: slice, far: Tensor) -> tuple[list[_Part], list[_Part]]:
        """What is scored one by one: near keys, sinks and heavy keys, where there are any. And the
        features, if there are any."""
        sizes, problem = self.sizes, self.problem
        query, blocks = self.query[index, tile], tile.stop - tile.start
        key, value = self.windows(self.key[index], tile), self.windows(self.value[index], tile)
        parts = [_Part(query, key, value, self.near_mask)]
        if sizes.sinks:
            place = torch.arange(blocks * sizes.block, device=query.device)
            place += tile.start * sizes.block
            unseen = place[:, None] < problem.sink_start[self.heads.start + index]
            mask = self.like.new_zeros(unseen.shape).masked_fill_(unseen, HIDDEN)
            mask = mask.unflatten(0, (blocks, sizes.block)).repeat(1, sizes.group, 1)
            key = self.sink_key[index].expand(blocks, -1, -1)
            value = self.sink_value[index].expand(blocks, -1, -1)
            parts.append(_Part(query, key, value, mask))
        if sizes.heavy:
            parts.append(_Part(query, self.heavy_key[index, tile], self.heavy_value[index, tile]))
        if not sizes.features:
            return parts, []
        key = self.far_key[:blocks]
        key[..., : sizes.dim] = self.directions(self.query_side, index)
        key[..., sizes.dim] = self.far_numbers[index, tile]
        return parts, [_Part(self.query_y[index, tile], key, far[index, tile])]

    def far_logs(self, index: int, tile: slice, log_sum: Tensor, near: Tensor) -> Tensor:
        """The logs of what the features add to normalizers, of their own log-sums, and of what is
        near, which limits them."""
        log = log_sum + self.query_number[index, tile] + self.far_shift[index, tile]
        if self.problem.far_limit is None:
            return log
        room = near + math.log(self.problem.far_limit)
        is_free = near <= HIDDEN / 2  # nothing is near
        return torch.where(is_free, log, torch.minimum(log, room))

    def attend(self, far: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, the logs of their normalizers and the log-sums of features, [heads, count, rows,
        ·]."""
        sizes = self.sizes
        shape = self.number, sizes.count, sizes.rows
        out, log_sum = self.take("out", *shape, sizes.value_dim), self.take("log sum", *shape, 1)
        far_log_sum = self.take("far log sum", *shape, sizes.num_far)
        for index in range(self.number):
            for tile in sizes.tiles():
                near, features = self.parts(index, tile, far)
                found = [exact.attend(*part) for part in near]
                logs = torch.stack([log for _, log in found])
                for part in features:
                    found.append(exact.attend(*part))
                    of_features = found[-1][1]
                    far_log_sum[index, tile, :, 0] = of_features
                    near_log = logs.logsumexp(dim=0)
                    far_log = self.far_logs(index, tile, of_features, near_log)
                    logs = torch.cat([logs, far_log.unsqueeze(0)])
                log_sum[index, tile, :, 0] = logs.logsumexp(dim=0)
                shares = logs.softmax(dim=0).unsqueeze(-1)
                rows = out[index, tile]
                torch.mul(found[0][0][..., : sizes.value_dim], shares[0], out=rows)
                for (of_part, _), share in zip(found[1:], shares[1:], strict=True):
                    rows.addcmul_(of_part[..., : sizes.value_dim], share)
        return out, log_sum, far_log_sum


class _Backward(_Heads):
    """Some heads on the way back: the gradients of all that `_Heads` has of them.

    The gradient of a logit is w (dO·v − e): w its weight, e what all logits of its softmax lose.
    Where a limit c binds, near and far are two softmaxes, whose weights sum to 1 / (1 + c) and
    c / (1 + c). `exact.attend_back` takes e from two columns beside dO and the outputs:

        gradients   dO, 0 or e, 1        outputs   0, 0, e

    where the first lets each feature learn with dF the sum of e w, which its far blocks lose.
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
        self.of_out = self.take("of out", *shape, sizes.width)
        self.put(gradients.out[heads], self.of_out)
        self.log_sum, self.of_log_sum, self.excess = (
            self.take(name, *shape, 1) for name in ("log sum", "of log sum", "excess")
        )
        self.put(found.log_sum[heads], self.log_sum)
        self.put(gradients.log_sum[heads], self.of_log_sum)
        self.far_log_sum = self.take("far log sum", *shape, found.far_log_sum.shape[-1])
        self.put(found.far_log_sum[heads], self.far_log_sum)
        spare = self.take("spare rows", *shape, sizes.value_dim)
        self.put(found.out[heads], spare)
        spare.mul_(self.of_out[..., : sizes.value_dim])
        torch.sum(spare, dim=-1, keepdim=True, out=self.excess).sub_(self.of_log_sum)
        self.of_out[..., sizes.value_dim + 1] = 1.0
        self.outputs = self.take("of part out", sizes.tile, sizes.rows, sizes.width).zero_()
        self.of_query = self.take("of query", *self.query.shape)
        self.of_key = self.take("of key", *self.key.shape).zero_()
        self.of_value = self.take("of value", *self.value.shape).zero_()
        self.of_sink_key = torch.zeros_like(self.sink_key)
        self.of_sink_value = torch.zeros_like(self.sink_value)
        self.of_heavy_key = torch.empty_like(self.heavy_key)
        self.of_heavy_value = torch.empty_like(self.heavy_value)
        directions = self.number, sizes.features if with_directions else 0, sizes.width
        self.of_query_directions = self.like.new_zeros(directions)
        self.of_key_directions = self.like.new_zeros(directions)

    def rows_back(self, far: Tensor) -> Tensor:
        """Back through the softmaxes of rows: dF and, beside it, what each feature's far blocks
        lose."""
        sizes, value_dim = self.sizes, self.sizes.value_dim
        of_far = self.take("of far average", *far.shape)
        if sizes.features:
            of_y = self.take("of query y", *self.query_y.shape)
        for index in range(self.number):
            for tile in sizes.tiles():
                near, features = self.parts(index, tile, far)
                log_sum, of_out, lost = (
                    x[index, tile].squeeze(-1) for x in (self.log_sum, self.of_out, self.excess)
                )
                out = self.outputs[: len(lost)]
                far_lost = lost
                for part in features:
                    own_log_sum = self.far_log_sum[index, tile].squeeze(-1)
                    far_log = self.far_logs(index, tile, own_log_sum, log_sum)
                    if self.problem.far_limit is not None:
                        lost, far_lost, far_log = self.limited(index, tile, near, own_log_sum)
                    share = (far_log - log_sum).exp_()
                    of_share = self.take("of part", *of_out.shape)
                    torch.mul(of_out, share.unsqueeze(-1), out=of_share)
                    of_share[..., value_dim] = out[..., value_dim + 1] = far_lost * share
                    of_share[..., value_dim + 1] = 1.0
                    of_y[index, tile], of_directions, of_far[index, tile] = exact.attend_back(
                        of_share, *part, out, own_log_sum
                    )
                    if self.with_directions:
                        self.of_query_directions[index] += of_directions.sum(dim=0)
                out[..., value_dim + 1] = lost
                of_near = [exact.attend_back(of_out, *part, out, log_sum) for part in near]
                of_query, of_key, of_value = of_near[0]
                self.of_query[index, tile] = of_query
                self.add_near(self.of_key[index], tile, of_key)
                self.add_near(self.of_value[index], tile, of_value)
                for of_query, _, _ in of_near[1:]:
                    self.of_query[index, tile] += of_query
                if sizes.sinks:
                    _, of_key, of_value = of_near[1]
                    self.of_sink_key[index] += of_key.sum(dim=0)
                    self.of_sink_value[index] += of_value.sum(dim=0)
                if sizes.heavy:
                    _, of_key, of_value = of_near[-1]
                    self.of_heavy_key[index, tile] = of_key
                    self.of_heavy_value[index, tile] = of_value
        if sizes.features:
            self.side_back(self.query_side, self.query_y, of_y, self.of_query, sizes.dim + 2)
        return of_far

    def side_back(self, side: _Side, y: Tensor, of_y: Tensor, of_x: Tensor, of_number: int) -> None:
        """Add what goes back through a side to the gradient of its rows; the number's gradient is
        that column of y's."""
        dim = self.sizes.dim
        y, of_y, of_x = (rows.flatten(1, -2) for rows in (y, of_y, of_x))
        column = of_y[..., of_number : of_number + 1]
        side.mapped_back(self.heads, y[..., :dim], of_y[..., :dim], column, of_x[..., :dim])

    def limited(
        self, index: int, tile: slice, near: list[_Part], far_log_sum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """e of what is near and of features, and the logs of what these add to normalizers."""
        limit = self.problem.far_limit
        assert limit is not None
        log_sum, of_log_sum, lost = (
            x[index, tile].squeeze(-1) for x in (self.log_sum, self.of_log_sum, self.excess)
        )
        found = [exact.attend(*part) for part in near]
        near_log = torch.stack([log for _, log in found]).logsumexp(dim=0)
        of_near = torch.zeros_like(lost)
        for out, log in found:
            of_near += (out * self.of_out[index, tile]).sum(dim=-1) * (log - log_sum).exp_()
        far_log = self.far_logs(index, tile, far_log_sum, near_log)
        free = self.far_logs(index, tile, far_log_sum, torch.full_like(near_log, HIDDEN))
        is_limited = far_log < free
        of_exact = torch.where(is_limited, (of_near - of_log_sum) * (1 + limit), lost)
        of_far = (lost + of_log_sum - of_near) * (1 + 1 / limit)
        return of_exact, torch.where(is_limited, of_far, lost), far_log

    def add_near(self, of_rows: Tensor, tile: slice, of_windows: Tensor) -> None:
        """Add what the windows of blocks have to the rows of keys."""
        size = self.sizes.block
        rows = of_rows[tile.start * size :]
        for start in range(0, self.sizes.near, size):
            there = rows[start : start + len(of_windows) * size].unflatten(0, (-1, size))
            there += of_windows[:, start : start + size]

    def keys_back(self, log_sum: Tensor, of_blocks: Tensor) -> None:
        """Back through the averages of blocks, which `log_sum` made."""
        sizes, value_dim = self.sizes, self.sizes.value_dim
        of_y = self.take("of key y", *self.key_y.shape)
        outputs = self.take("of block out", sizes.tile, *of_blocks.shape[2:]).zero_()
        shift = sizes.before * sizes.block
        excess = of_blocks[..., value_dim].clone()
        of_blocks[..., value_dim + 1] = 1.0
        for index in range(self.number):
            for tile in sizes.tiles():
                part = self.keys_of_features(index, tile)
                of_average, lost = of_blocks[index, tile], excess[index, tile]
                out = outputs[: len(lost)]
                out[..., value_dim + 1] = lost
                of_directions, of_y[index, tile], of_value = exact.attend_back(
                    of_average, *part, out, log_sum[index, tile]
                )
                rows = slice(shift + tile.start * sizes.block, shift + tile.stop * sizes.block)
                self.of_value[index, rows].unflatten(0, (-1, sizes.block)).add_(of_value)
                if self.with_directions:
                    self.of_key_directions[index] += of_directions.sum(dim=0)
        rows = slice(shift, shift + sizes.count * sizes.block)
        self.side_back(self.key_side, self.key_y, of_y, self.of_key[:, rows], sizes.dim + 1)


def forward(problem: Problem) -> BlockAttention:
    """Attention of all heads."""
    sizes = _Sizes(problem)
    out = problem.query.new_empty(*problem.query.shape[:3], sizes.value_dim)
    log_sum = problem.average.new_empty(*problem.query.shape[:3], 1)
    far_log_sum = log_sum.new_empty(*problem.query.shape[:3], sizes.num_far)
    log_mass, average = torch.empty_like(problem.log_mass), torch.empty_like(problem.average)
    for heads in sizes.head_groups():
        work = _Heads(problem, sizes, heads)
        blocks, _ = work.block_averages()
        merge, far, last = work.far_averages(blocks)
        average[heads] = last[..., : sizes.value_dim]
        log_mass[heads] = merge.before.log_mass[:, -1]
        for x, rows in zip((out, log_sum, far_log_sum), work.attend(far), strict=True):
            for part, there in work.paired(x[heads], rows):
                part.copy_(there)
    return BlockAttention(out, log_sum, log_mass, average, far_log_sum)


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
    dim, value_dim = sizes.dim, sizes.value_dim
    for heads in sizes.head_groups():
        work = _Backward(problem, sizes, heads, found, gradients, with_directions)
        blocks, log_sum = work.block_averages()
        merge, far, last = work.far_averages(blocks)
        of_far = work.rows_back(far)
        if sizes.features:
            of_last = work.wide(gradients.average)
            lost = (of_last * last).sum(dim=-1) - gradients.log_mass[heads]
            of_last[..., value_dim] = lost
            of_blocks = work.take("of block average", *of_far.shape).zero_()
            of_first = merge.far_back(of_last, of_far, of_blocks)
            work.keys_back(log_sum, of_blocks)
            of["average"][heads] = of_first[..., :value_dim]
            along = (of_first[..., :value_dim] * problem.average[heads]).sum(dim=-1)
            of["log_mass"][heads] = along - of_first[..., value_dim]
        for part, rows in work.paired(of["query"][heads], work.of_query[..., :dim]):
            torch.mul(rows, work.root, out=part)
        torch.mul(work.of_key[:, work.own, :dim], work.root, out=of["key"][heads])
        of["value"][heads] = work.of_value[:, work.own, :value_dim]
        for name in ("sink", "heavy"):
            of_key, of_value = (getattr(work, f"of_{name}_{part}") for part in ("key", "value"))
            of[f"{name}_key"][heads] = of_key[..., :dim] * work.root
            of[f"{name}_value"][heads] = of_value[..., :value_dim]
        if with_directions:
            tilt = work.of_query_directions[..., dim].unsqueeze(1)
            queries, keys = work.of_query_directions[..., :dim], work.of_key_directions[..., :dim]
            for name, part in zip(SHARED, (queries, keys, tilt), strict=True):
                if len(of[name]) > 1:
                    of[name][heads] = part
                else:
                    of[name] += part.sum(dim=0, keepdim=True)
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
        if has_features:
            log_scale, normalizer, values = carry
            far = LinearState(log_scale, normalizer, values)
            if not problem.is_causal:
                log_scale, normalizer, values = (x.squeeze(1) for x in rest[3:])
                far = far.merge(LinearState(log_scale, normalizer, values))
            estimated = read(far, query_side.log_linear(query).features())
            if problem.far_limit is not None:
                estimated, _ = estimated.limited(partial, problem.far_limit)
            partial = partial.merge(estimated)
            carry = absorbed(carry, [x.squeeze(1) for x in rest[:3]])
        is_blind = partial.normalizer == 0
        total = partial.normalizer.masked_fill(is_blind, 1.0)
        log_sum = (total.log() + partial.frame).masked_fill(is_blind, HIDDEN)
        return carry, [x.squeeze(1) for x in (partial.numerator / total, log_sum)]

    carry, found = folded(step, carry, inputs)
    out, log_sum = (
        x.unflatten(2, (group, size)).movedim(0, 2).flatten(2, 3)[:, :, :length] for x in found
    )
    out, far_log_sum = out.to(problem.query.dtype), log_sum[..., :0].detach()
    if not has_features:
        return BlockAttention(out, log_sum, problem.log_mass, problem.average, far_log_sum)
    log_scale, normalizer, values = absorbed(carry, [x[-1] for x in of_keys])
    log_scale, normalizer, values = (x.squeeze(1) for x in (log_scale, normalizer, values))
    is_empty = normalizer == 0
    total = normalizer.masked_fill(is_empty, 1.0)
    log_mass = (total.log() + log_scale).masked_fill(is_empty, HIDDEN)
    return BlockAttention(out, log_sum, log_mass, values / total.unsqueeze(-1), far_log_sum)


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
        problem.average.new_empty(*shape, _Sizes(problem).num_far),
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
