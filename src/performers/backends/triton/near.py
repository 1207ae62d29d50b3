"""Attention with a near field by the fused kernels: the operator that `backends.near` drives.

    forward    absorb, scan    keys → the state of every block → what is far of every block
               read            near keys, sinks and that state → outputs
    backward   absorb, scan    keys, as before
               row_products    δ_i = dO_i·O_i
               query_gradient
               absorb, scan    queries → the state of every block → what is far of every block
               key_gradient

The far field of a block begins two blocks before it, and in bidirectional attention also two blocks
after it. States of blocks exist during a pass only. Their frames are the running maxima of
exponents, as in an online softmax.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from performers.backends.blocks import BlockAttention, Problem
from performers.backends.derivatives import refuse_second_derivative
from performers.backends.fused_softmax import HIDDEN
from performers.backends.triton import near_kernels
from performers.backends.triton.affine import mapped
from performers.backends.triton.attention import Contraction, Sums, row_products, states_of_chunks
from performers.backends.triton.config import Tile, cdiv, width
from performers.typing import LogLinearSide

__all__ = ["block_attention"]

SINKS = 16  # in a tile


def block_attention(problem: Problem) -> BlockAttention:
    """What `blocks.block_attention` computes, without a gradient of directions and tilt."""
    root, dtype = math.sqrt(problem.scale), torch.float32
    # Sides of a problem have a row for each head or one for all, as the heads of one sequence.
    query_side = LogLinearSide(
        problem.query_directions, 0.0, None, problem.query_shift, problem.query_matrix,
        problem.query_linear,
    )  # fmt: skip
    key_side = LogLinearSide(
        problem.key_directions, 0.0, None, problem.key_shift, problem.key_matrix,
        problem.key_linear,
    )  # fmt: skip
    rows, keys = problem.query.flatten(1, 2), problem.key
    query_y, query_numbers = mapped(query_side, rows.unsqueeze(0), root)
    key_y, key_numbers = mapped(key_side, keys.unsqueeze(0), root)
    if query_numbers is None:
        query_numbers = torch.zeros_like(query_y[..., 0], dtype=dtype)
    if key_numbers is None:
        key_numbers = torch.zeros_like(key_y[..., 0], dtype=dtype)
    key_y, key_numbers = key_y.squeeze(0), key_numbers.squeeze(0)
    if problem.hidden_far is not None:
        key_numbers = key_numbers.masked_fill(problem.hidden_far, -math.inf)
    near_rows = torch.zeros_like(problem.key[..., 0], dtype=dtype)
    if problem.hidden_near is not None:
        near_rows.masked_fill_(problem.hidden_near, -math.inf)
    frame = problem.log_mass.detach()
    is_empty = frame <= HIDDEN / 2
    mass = (problem.log_mass - frame).exp().masked_fill(is_empty, 0.0)
    out, log_sum, frame, mass, values = _near(
        problem.query,
        keys,
        problem.value,
        near_rows,
        query_y.view(problem.query.shape),
        query_numbers.view(problem.query.shape[:3]),
        key_y,
        key_numbers,
        problem.sink_key,
        problem.sink_value,
        problem.sink_start,
        problem.query_directions.detach() * root,
        problem.key_directions.detach() * root,
        problem.tilt.detach(),
        frame.masked_fill(is_empty, -math.inf),
        mass,
        problem.average * mass.unsqueeze(-1),
        min(problem.window_size, problem.query.shape[2]),
        problem.scale,
        problem.is_causal,
    )
    is_empty = mass == 0
    total = mass.masked_fill(is_empty, 1.0)
    log_mass = (frame + total.log()).masked_fill(is_empty, HIDDEN)
    average, log_sum = values / total.unsqueeze(-1), log_sum.unsqueeze(-1)
    return BlockAttention(out, log_sum, log_mass, average, log_factor=log_sum[..., :0])


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor near_rows, Tensor query_y, "
    "Tensor query_numbers, Tensor key_y, Tensor key_numbers, "
    "Tensor sink_key, Tensor sink_value, Tensor sink_start, "
    "Tensor query_omega, Tensor key_omega, Tensor tilt, "
    "Tensor frames, Tensor normalizers, Tensor values, int window, float scale, bool is_causal"
)


class _Work:
    """The arguments of the operator, [heads, …] each, and what its kernels take."""

    def __init__(self, *arguments: Any) -> None:
        *tensors, self.window, self.scale, self.is_causal = arguments
        (
            self.query, self.key, self.value, self.near_rows, self.query_y, self.query_numbers,
            self.key_y, self.key_numbers, self.sink_key, self.sink_value, self.sink_start,
            query_omega, key_omega, tilt, *_,
        ) = (x.contiguous() for x in tensors)  # fmt: skip
        # A head as a batch of one key head: the layout of the other kernels.
        frames, normalizers, values = (x.contiguous().unsqueeze(1) for x in tensors[-3:])
        self.first: Sums = (frames, normalizers, values)
        shared = self.first, "exp", 0.0, self.scale, self.is_causal
        self.queries = Contraction.of(self.query, self.value, query_omega, tilt, *shared)
        no_tilt = torch.zeros_like(key_omega[..., 0])
        self.keys = Contraction.of(self.key.unsqueeze(1), self.value, key_omega, no_tilt, *shared)
        self.heads, self.group, self.length, self.dim = self.query.shape
        self.blocks = cdiv(self.length, self.window)

    def far(self, each: Sums, first: Sums, is_reverse: bool) -> tuple[Sums, Sums]:
        """Of every block the sum of the first state and of the blocks' far before it (`is_reverse`:
        after it), in bidirectional attention also of those on the other side; the sum of all."""
        result, last = self.queries.scan(each, first, is_reverse, skips=True)
        if not self.is_causal:
            frames, normalizers, values = first
            nothing = (
                torch.full_like(frames, -math.inf),
                torch.zeros_like(normalizers),
                torch.zeros_like(values),
            )
            self.queries.scan(each, nothing, not is_reverse, skips=True, add_to=result)
        return result, last

    def far_keys(self) -> tuple[Sums, Sums]:
        """What queries of every block read, and the last state."""
        key, value = self.key_y.unsqueeze(1), self.value.unsqueeze(1)
        each = states_of_chunks(
            self.keys, key, value, self.key_numbers.unsqueeze(1), None, self.first, self.window,
            self.scale,
        )  # fmt: skip
        return self.far(each, self.first, is_reverse=False)

    @cached_property
    def rows(self) -> int:
        """Of a tile: at most those of a block."""
        return min(self.queries.rows, width(self.window))

    def grid(self, heads: int) -> tuple[int, int]:
        return self.blocks * cdiv(self.window, self.rows), heads

    def options(self, tile: Tile) -> dict[str, Any]:
        return self.queries.options(tile) | {"ROWS": self.rows, "IS_CAUSAL": self.is_causal}

    def of_queries(self, far: Sums) -> tuple[Any, ...]:
        """The first arguments of `read` and `query_gradient`."""
        call = self.queries
        return (
            self.query, self.key, self.value, self.near_rows, self.query_y, self.query_numbers,
            self.sink_key, self.sink_value, self.sink_start, call.high, call.low, call.tilt, *far,
        )  # fmt: skip

    def sizes(self) -> tuple[Any, ...]:
        call = self.queries
        return call.num_features, self.dim, call.value_dim, self.scale


@torch.library.custom_op(
    "performers::triton_near",
    mutates_args=(),
    schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _near(*arguments: Any) -> tuple[Tensor, ...]:
    """Outputs, the logs of their normalizers, and the last state, whose frames have no gradient."""
    work = _Work(*arguments)
    far, last = work.far_keys()
    out = work.query.new_empty(*work.query.shape[:3], work.value.shape[-1])
    log_sum = work.query_numbers.new_empty(work.query.shape[:3])
    near_kernels.read[work.grid(work.heads * work.group)](
        *work.of_queries(far), out, log_sum, work.group, work.length, work.window, work.blocks,
        work.sink_key.shape[1], *work.sizes(), SINKS=SINKS,
        **work.options(work.queries.config.near_read),
    )  # fmt: skip
    return out, log_sum, *(x.squeeze(1) for x in last)


@_near.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    query, value, query_numbers = arguments[0], arguments[2], arguments[5]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, torch.empty_like(query_numbers), *(torch.empty_like(x) for x in arguments[14:17])


@torch.library.custom_op(
    "performers::triton_near_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor[] found, Tensor[] gradients) -> Tensor[]",
)
def _near_backward(*arguments: Any) -> list[Tensor]:
    """Gradients of query, key, value, query_y, query_numbers, key_y, key_numbers, sink_key,
    sink_value, and of the first state's normalizers and values."""
    *inputs, found, gradients = arguments
    work = _Work(*inputs)
    out, log_sum, last_frames, *_ = found
    d_out, d_log_sum, _, d_normalizers, d_values = (x.contiguous() for x in gradients)
    shares = row_products(work.queries, out, d_out) - d_log_sum
    rows = (-log_sum).masked_fill(log_sum == -math.inf, -math.inf)
    far, _ = work.far_keys()
    d_query, d_query_y, d_query_numbers = (
        torch.empty_like(x) for x in (work.query, work.query_y, work.query_numbers)
    )
    near_kernels.query_gradient[work.grid(work.heads * work.group)](
        *work.of_queries(far), d_out, rows, shares, d_query, d_query_y, d_query_numbers,
        work.group, work.length, work.window, work.blocks, work.sink_key.shape[1],
        *work.sizes(), SINKS=SINKS, **work.options(work.queries.config.near_query_gradient),
    )  # fmt: skip

    # The gradient of the last state is itself a state of queries, which keys read.
    end_frames = (-last_frames).masked_fill(last_frames == -math.inf, -math.inf)
    end = (end_frames.unsqueeze(1), -d_normalizers.unsqueeze(1), d_values.unsqueeze(1))
    each = states_of_chunks(
        work.queries, work.query_y, d_out, rows + work.query_numbers, shares, end, work.window,
        work.scale,
    )  # fmt: skip
    later, whole = work.far(each, end, is_reverse=True)
    d_key, d_key_y, d_key_numbers, d_value = (
        torch.empty_like(x) for x in (work.key, work.key_y, work.key_numbers, work.value)
    )
    call = work.keys
    near_kernels.key_gradient[work.grid(work.heads)](
        work.query, work.key, work.value, work.near_rows, work.key_y, work.key_numbers,
        call.high, call.low, call.tilt, *later, d_out, rows, shares,
        d_key, d_key_y, d_key_numbers, d_value,
        work.group, work.length, work.window, work.blocks, *work.sizes(),
        **work.options(work.queries.config.near_key_gradient),
    )  # fmt: skip
    decay = (work.first[0] + whole[0]).exp()
    return [
        d_query, d_key, d_value, d_query_y, d_query_numbers, d_key_y, d_key_numbers,
        *_sink_gradients(work, d_out, rows, shares),
        (-whole[1] * decay).squeeze(1), (whole[2] * decay.unsqueeze(-1)).squeeze(1),
    ]  # fmt: skip


DIFFERENTIABLE = (0, 1, 2, 4, 5, 6, 7, 8, 9, 15, 16)  # of the arguments


@_near_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    return [
        torch.empty_like(arguments[index], memory_format=torch.contiguous_format)
        for index in DIFFERENTIABLE
    ]


def _sink_gradients(
    work: _Work, d_out: Tensor, rows: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Of keys and values of sinks, which are few, by torch."""
    if not work.sink_key.shape[1]:
        return torch.empty_like(work.sink_key), torch.empty_like(work.sink_value)
    query, key, value, d_out = (
        x.to(torch.float32) for x in (work.query, work.sink_key, work.sink_value, d_out)
    )
    key, value = key.unsqueeze(1), value.unsqueeze(1)
    position = torch.arange(work.length, device=query.device)
    unseen = position[:, None] < work.sink_start[:, None, None]  # [heads, 1, length, sinks]
    logits = (query @ key.mT * work.scale + rows.unsqueeze(-1)).clamp(max=0)
    weights = logits.masked_fill(unseen, -math.inf).exp()
    d_logits = weights * (d_out @ value.mT - shares.unsqueeze(-1))
    d_key = (d_logits.mT @ query).sum(dim=1) * work.scale
    d_value = (weights.mT @ d_out).sum(dim=1)
    return d_key.to(work.sink_key.dtype), d_value.to(work.sink_value.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[17:]
    ctx.save_for_backward(*inputs[:17], *output)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    found = _near_backward(*saved[:17], *ctx.options, list(saved[17:]), list(gradients))
    result: list[Tensor | None] = [None] * 20
    for index, gradient in zip(DIFFERENTIABLE, found, strict=True):
        result[index] = gradient
    return tuple(result)


_near.register_autograd(_differentiate, setup_context=_save)
_near_backward.register_autograd(refuse_second_derivative("the Triton backend"))
