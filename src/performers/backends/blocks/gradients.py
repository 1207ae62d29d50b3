"""The backward pass of some heads, a tile of blocks at a time."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.blocks.far import Averages
from performers.backends.blocks.rows import Heads
from performers.backends.blocks.sides import Mapped, Side
from performers.backends.blocks.sizes import LOG2_E, BlockAttention, Problem, Sizes
from performers.backends.fused_softmax import HIDDEN

__all__ = ["HeadsBack"]


class HeadsBack(Heads):
    """Some heads on the way back: the gradients of all that `Heads` has of them.

    The gradient of a logit is w (dO·v − e): w its weight, e what all logits of its softmax lose.
    Where a limit c binds, near and far are two softmaxes, whose weights sum to 1 / (1 + c) and
    c / (1 + c).
    """

    def __init__(
        self,
        problem: Problem,
        sizes: Sizes,
        heads: slice,
        sides: tuple[Side, Side],
        found: BlockAttention,
        gradients: BlockAttention,
        of_query: Float[Tensor, "all_heads group length dim"],
        with_directions: bool,
    ) -> None:
        super().__init__(problem, sizes, heads, sides)
        self.with_directions = with_directions
        self.of_out = self.in_blocks("of out", gradients.out)
        self.log_sum = self.in_blocks("log sum", found.log_sum)
        self.of_log_sum = self.in_blocks("of log sum", gradients.log_sum)
        self.out = self.in_blocks("out", found.out)
        self.is_fused = self.near.is_fused and self.is_plain()
        if sizes.limits:
            self.log_factor = self.in_blocks("log factor", found.log_factor) * LOG2_E
        # of all keys, first with their weights, then with the gradients of these
        blocks = self.number * sizes.count
        self.mapped = self.key_side.room("mapped keys", blocks, sizes.block, self.like)
        self.of_query, self.is_of_query_itself = self.room("of query", of_query)
        self.of_key = self.take("of key", *self.key.shape).zero_()
        self.of_value = self.take("of value", *self.value.shape).zero_()
        self.of_sink_key = torch.zeros_like(self.sink_key)
        self.of_sink_value = torch.zeros_like(self.sink_value)
        self.of_heavy_key = torch.empty_like(self.heavy_key)
        self.of_heavy_value = torch.empty_like(self.heavy_value)
        directions = self.number, sizes.features if with_directions else 0, sizes.dim
        self.of_query_directions = self.like.new_zeros(directions)
        self.of_key_directions = self.like.new_zeros(directions)
        self.of_tilt = self.like.new_zeros(self.number, 1, sizes.features)

    def is_plain(self) -> bool:
        """Whether PyTorch's kernel can go back through all rows: what logits lose is that of
        outputs alone, and the log of no normalizer is so large that its rounding shows."""
        log_sum = self.log_sum
        is_in_reach = (log_sum.abs() < 2**12) | (log_sum < HIDDEN / 2)
        is_of_outputs = not (self.sizes.limits or bool(self.of_log_sum.any()))
        return is_of_outputs and bool(is_in_reach.all())

    def rows_back(self, far: Averages) -> tuple[Tensor, Tensor]:
        """Back through the softmaxes of rows: dF in the place of F, and e of each feature's sum
        over far blocks."""
        sizes, scale = self.sizes, self.problem.scale
        excess = self.take("excess of far", *far.log_mass.unsqueeze(2).shape)
        excess[:, sizes.count :], far.average[:, sizes.count :] = 0.0, 0.0
        numbers = self.numbered(far)
        for tile, index in itertools.product(sizes.tiles(), range(self.number)):
            query, of_query, out, of_out, log_sum, of_log_sum = (
                x[index, tile]
                for x in (
                    self.query, self.of_query, self.out, self.of_out, self.log_sum,
                    self.of_log_sum,
                )
            )  # fmt: skip
            weights, mapped, number = self.row_logits(index, tile, numbers)
            values = self.values(index, tile, far.average)
            log_sum_2 = log_sum * LOG2_E
            shifts = [log_sum_2] * len(weights)
            if number is not None:
                shifts[-1] = log_sum_2 - number
            if sizes.limits:
                shifts[-1] = shifts[-1] - self.log_factor[index, tile]
            for x, shift in zip(weights, shifts, strict=True):
                # ≤ 0, but for the rounding of very large numbers
                x.sub_(shift).clamp_(max=0).exp2_()
            if not self.is_fused:
                near = self.near.logits(index, tile, query)
                weights.insert(0, near.sub_(log_sum_2).clamp_(max=0).exp2_())
                values.insert(0, self.near.windows(self.value[index], self.near.whole(tile)))
            of_logits = []
            for part, (x, value) in enumerate(zip(weights, values, strict=True)):
                of_x = self.take(f"of row logits {part}", *x.shape)
                of_logits.append(torch.bmm(of_out, value.mT, out=of_x))
            along = torch.mul(out, of_out, out=self.take("rows", *out.shape))
            lost = along.sum(dim=-1, keepdim=True).sub_(of_log_sum)
            losses = [lost] * len(weights)
            if sizes.limits:
                losses = self.losses(index, tile, lost, weights, of_logits)
                lost = losses[-1]
            for x, of_x, of_softmax in zip(weights, of_logits, losses, strict=True):
                of_x.sub_(of_softmax)
                if mapped is None or x is not weights[-1]:
                    of_x.mul_(x)
            # PyTorch has one product after another for rows that do not follow each other.
            is_dense = of_query.is_contiguous()
            of_rows = of_query if is_dense else self.take("rows", *of_query.shape)
            of_near = of_rows, self.of_key[index], self.of_value[index]
            if self.is_fused:
                self.near.attend_back(index, tile, query, out, log_sum, of_out, *of_near)
            else:
                near_weights, of_near_logits = weights.pop(0), of_logits.pop(0)
                self.near.weights_back(
                    index, tile, query, near_weights, of_near_logits, of_out, *of_near
                )
            if sizes.sinks:
                sinks, of_sinks = weights[0].flatten(0, 1), of_logits[0].flatten(0, 1)
                flat, of_flat = query.flatten(0, 1), of_rows.flatten(0, 1)
                self.of_sink_value[index].addmm_(sinks.mT, of_out.flatten(0, 1))
                self.of_sink_key[index].addmm_(of_sinks.mT, flat, alpha=scale)
                of_flat.addmm_(of_sinks, self.sink_key[index], alpha=scale)
            if sizes.heavy:
                part = int(bool(sizes.sinks))
                heavy, of_heavy = weights[part], of_logits[part]
                torch.bmm(heavy.mT, of_out, out=self.of_heavy_value[index, tile])
                torch.bmm(of_heavy.mT, query, out=self.of_heavy_key[index, tile])
                of_rows.baddbmm_(of_heavy, self.heavy_key[index, tile], alpha=scale)
            if mapped is not None:
                features = weights[-1]
                torch.bmm(of_out.mT, features, out=far.average[index, tile])
                torch.bmm(lost.mT, features, out=excess[index, tile])
                features.mul_(of_logits[-1])  # where `mapped` has its logits
                side, head, rows = self.query_side, self.heads.start + index, query.flatten(0, 1)
                if self.with_directions:
                    side.directions_back(head, rows, mapped, self.of_query_directions[index])
                    self.of_tilt[index] += mapped.flat.sum(dim=0)
                side.back(head, rows, mapped, of_rows.flatten(0, 1))
            if not is_dense:
                of_query.copy_(of_rows)
        return far.average, excess

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

    def mapped_keys(self, index: int, tile: slice) -> Mapped:
        first = index * self.sizes.count
        return self.mapped.part(slice(first + tile.start, first + tile.stop))

    def keys_back(self, of_average: Tensor, excess: Tensor) -> None:
        """Back through the averages of blocks, whose weights still have the place of logits. Both
        gradients are divided by the sums of these weights."""
        side, sizes = self.key_side, self.sizes
        for index, tile in itertools.product(range(self.number), sizes.tiles()):
            (_, own), head = self.tile_rows(tile), self.heads.start + index
            key, mapped = self.key[index, own], self.mapped_keys(index, tile)
            weights = mapped.logits
            value, of_value = (
                x[index, own].unflatten(0, (-1, sizes.block)) for x in (self.value, self.of_value)
            )
            of_value.baddbmm_(weights, of_average[index, tile].mT)
            of_weights = self.take("of key weights", *weights.shape)
            torch.bmm(value, of_average[index, tile], out=of_weights)
            weights.mul_(of_weights.sub_(excess[index, tile]))
            if self.with_directions:
                side.directions_back(head, key, mapped, self.of_key_directions[index])
            side.back(head, key, mapped, self.of_key[index, own])
