"""The operator as a formula, which can be differentiated any number of times."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks.sizes import BlockAttention, Problem
from performers.backends.fused_softmax import HIDDEN
from performers.backends.graphs import folded
from performers.backends.reference import absorb, exact_partial, read
from performers.state import LinearState
from performers.typing import LogLinearSide

__all__ = ["plain"]


def plain(*arguments: Any) -> BlockAttention:
    """The arguments of `Problem`, a block of queries at a time."""
    formula = _Formula(Problem(*arguments))
    carry, found = folded(formula.step, formula.first(), formula.inputs())
    return formula.outputs(carry, found)


class _Formula:
    """A problem cut into blocks, [blocks, heads, block, ·], each of which `step` attends.

    A sum over keys is the list of the three parts of a `LinearState` of one key head.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype, root = problem.average.dtype, math.sqrt(problem.scale)
        self.group, self.length = problem.query.shape[1:3]
        # No length that changes may be the size of a block in an exported graph.
        self.size = problem.window_size
        if not torch.compiler.is_exporting():
            self.size = min(self.size, self.length)
        self.has_features = problem.average.shape[-2] > 0
        self.has_heavy = problem.heavy_key.shape[2] > 0
        self.query_side = LogLinearSide(
            problem.query_directions.unsqueeze(1), 0.0, problem.tilt, _one(problem.query_shift),
            _one(problem.query_matrix), _one(problem.query_linear),
        )  # fmt: skip
        self.key_side = LogLinearSide(
            problem.key_directions.unsqueeze(1), 0.0, None, _one(problem.key_shift),
            _one(problem.key_matrix), _one(problem.key_linear),
        )  # fmt: skip
        self.query = self.blocks(problem.query.to(self.dtype) * root)
        self.key = self.blocks(problem.key.to(self.dtype) * root)
        self.value = self.blocks(problem.value.to(self.dtype))
        self.sink_key = problem.sink_key.to(self.dtype).unsqueeze(1) * root
        self.sink_value = problem.sink_value.to(self.dtype).unsqueeze(1)
        self.heavy_key = problem.heavy_key.to(self.dtype) * root
        self.of_keys = [self.key, self.value, self.shown(problem.hidden_far)]
        self.place = torch.arange(self.length, device=problem.query.device)
        later = torch.ones(self.size, self.size, dtype=torch.bool, device=problem.query.device)
        later = torch.cat([torch.zeros_like(later), later.triu(1)], dim=1)
        self.later = later.repeat(self.group, 1)

    def blocks(self, x: Tensor) -> Float[Tensor, "blocks *heads block _"]:
        x = F.pad(x, (0, 0, 0, -self.length % self.size))
        return x.unflatten(-2, (-1, self.size)).movedim(-3, 0)

    def shown(self, hidden: Bool[Tensor, "heads length"] | None) -> Tensor:
        """1 for keys that are not hidden, 0 for others and beyond the last."""
        ones = torch.ones_like(self.problem.key[..., :1], dtype=self.dtype)
        return self.blocks(ones if hidden is None else ones.masked_fill(hidden.unsqueeze(-1), 0.0))

    def neighbors(self, x: Tensor) -> list[Tensor]:
        """What is in the block before each, in its own, and in the one after it unless causal."""
        nothing = torch.zeros_like(x[:1])
        later = [] if self.problem.is_causal else [torch.cat([x[1:], nothing])]
        return [torch.cat([nothing, x[:-1]]), x, *later]

    def first(self) -> list[Tensor]:
        """The sum over the keys before the first block."""
        frame = self.problem.log_mass.detach()
        is_empty = frame <= HIDDEN / 2
        mass = (self.problem.log_mass - frame).exp().masked_fill(is_empty, 0.0)
        sums = self.problem.average * mass.unsqueeze(-1)
        parts = [frame.masked_fill(is_empty, -torch.inf), mass, sums]
        return [part.unsqueeze(1) for part in parts]

    def absorbed(self, carry: list[Tensor], block: list[Tensor]) -> list[Tensor]:
        """A sum with the keys of a block: keys, values, and 1 where a key is shown."""
        key, value, is_shown = block
        features = self.key_side.log_linear(key.unsqueeze(1)).features()
        after = absorb(_state(carry), features, value.unsqueeze(1), is_shown[..., 0] > 0)
        return [after.log_scale, after.normalizer, after.values]

    def after_each(self) -> list[Tensor]:
        """Sums over what is far of each block and after it."""
        frame, *sums = self.first()
        nothing = [torch.full_like(frame, -torch.inf), *map(torch.zeros_like, sums)]

        def step(carry: list[Tensor], block: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            after = self.absorbed(carry, block)
            return after, after

        _, ends = folded(step, nothing, [x.flip(0) for x in self.of_keys])
        # What is far of a block begins two blocks after it.
        return [
            torch.cat([x.flip(0), none.expand(2, *none.shape)])[2:]
            for x, none in zip(ends, nothing, strict=True)
        ]

    def inputs(self) -> list[Tensor]:
        """What `step` takes of each block."""
        near = [self.key, self.value, self.shown(self.problem.hidden_near)]
        inputs = [
            self.query.flatten(2, 3),
            *(torch.cat(self.neighbors(x), dim=2) for x in near),
            self.blocks(self.place.unsqueeze(-1)).repeat(1, self.group, 1),
        ]
        if self.has_heavy:
            is_there = ~self.problem.heavy_hidden.unsqueeze(2)
            heavy = self.heavy_key, self.problem.heavy_value.to(self.dtype), is_there
            inputs += [x.movedim(1, 0) for x in heavy]
        if self.has_features:
            inputs += [self.neighbors(x)[0] for x in self.of_keys]
            if not self.problem.is_causal:
                inputs += self.after_each()
        return inputs

    def step(self, carry: list[Tensor], block: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The sum over the keys before the next block; of the queries of this one the outputs,
        the logs of their normalizers, and those of factors where there is a limit."""
        query, key, value, is_shown, place, *rest = [x.unsqueeze(1) for x in block]
        visible = is_shown.mT > 0
        if self.problem.is_causal:
            visible = visible & ~self.later
        masks = [place.movedim(0, 1) >= self.problem.sink_start[:, None, None], visible]
        exact = [(self.sink_key, self.sink_value), (key, value)]
        if self.has_heavy:
            heavy_key, heavy_value, is_there, *rest = rest
            masks.append(is_there)
            exact.append((heavy_key, heavy_value))
        mask = torch.cat([x.expand(-1, 1, query.shape[2], -1) for x in masks], dim=-1)
        keys, values = (torch.cat(x, dim=2) for x in zip(*exact, strict=True))
        partial = exact_partial(query, keys, values, mask)
        limits = []
        if self.has_features:
            far = _state(carry)
            if not self.problem.is_causal:
                far = far.merge(_state([x.squeeze(1) for x in rest[3:]]))
            estimated = read(far, self.query_side.log_linear(query).features())
            if self.problem.far_limit is not None:
                estimated, log_factor = estimated.limited(partial, self.problem.far_limit)
                limits.append(log_factor.detach())
            partial = partial.merge(estimated)
            carry = self.absorbed(carry, [x.squeeze(1) for x in rest[:3]])
        is_blind = partial.normalizer == 0
        total = partial.normalizer.masked_fill(is_blind, 1.0)
        log_sum = (total.log() + partial.frame).masked_fill(is_blind, HIDDEN)
        return carry, [x.squeeze(1) for x in (partial.numerator / total, log_sum, *limits)]

    def outputs(self, carry: list[Tensor], found: list[Tensor]) -> BlockAttention:
        """Of the sum before the last block, and what `step` found of each."""
        out, log_sum, *limits = (
            x.unflatten(2, (self.group, self.size)).movedim(0, 2).flatten(2, 3)[:, :, : self.length]
            for x in found
        )
        out = out.to(self.problem.query.dtype)
        log_factor = limits[0] if limits else log_sum[..., :0].detach()
        log_mass, average = self.problem.log_mass, self.problem.average
        if self.has_features:
            carry = self.absorbed(carry, [x[-1] for x in self.of_keys])
            log_scale, normalizer, values = (x.squeeze(1) for x in carry)
            is_empty = normalizer == 0
            total = normalizer.masked_fill(is_empty, 1.0)
            log_mass = (total.log() + log_scale).masked_fill(is_empty, HIDDEN)
            average = values / total.unsqueeze(-1)
        return BlockAttention(out, log_sum, log_mass, average, log_factor)


def _one(x: Tensor | None) -> Tensor | None:
    """A head as a batch of one key head."""
    return None if x is None else x.unsqueeze(1)


def _state(parts: list[Tensor]) -> LinearState:
    log_scale, normalizer, values = parts
    return LinearState(log_scale, normalizer, values)
