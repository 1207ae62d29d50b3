"""The operator that PyTorch knows: its passes over all heads, its schema and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from performers.backends.blocks.formula import plain
from performers.backends.blocks.gradients import HeadsBack
from performers.backends.blocks.rows import Heads
from performers.backends.blocks.sides import both_sides
from performers.backends.blocks.sizes import BlockAttention, Problem, Sizes
from performers.backends.buffers import (
    KEPT_BYTES,
    KEPT_IN_TRAINING,
    buffers,
    room_of_outputs,
)
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients

__all__ = ["block_attention"]


def forward(problem: Problem) -> BlockAttention:
    """Attention of all heads."""
    sizes = Sizes(problem)
    out = room_of_outputs(problem.query, problem.value)
    log_sum = problem.average.new_empty(*problem.query.shape[:3], 1)
    log_factor = log_sum.new_empty(*problem.query.shape[:3], sizes.limits)
    log_mass, average = torch.empty_like(problem.log_mass), torch.empty_like(problem.average)
    sides = both_sides(problem)
    for heads in sizes.head_groups():
        work = Heads(problem, sizes, heads, sides)
        merge, far, average[heads] = work.far_averages(work.block_averages())
        log_mass[heads] = merge.last_mass
        work.attend(far, out, log_sum, log_factor)
    buffers.trim(KEPT_BYTES)
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
    sizes = Sizes(problem, is_back=True)
    of = {name: torch.empty_like(getattr(problem, name)) for name in DIFFERENTIABLE}
    for name in SHARED:
        of[name].zero_()
    sides = both_sides(problem, with_directions)
    for heads in sizes.head_groups():
        work = HeadsBack(
            problem, sizes, heads, sides, found, gradients, of["query"], with_directions
        )
        blocks = work.block_averages()
        merge, far, last = work.far_averages(blocks)
        of_far, excess = work.rows_back(far)
        if sizes.features:
            of_last = gradients.average[heads]
            lost = (of_last * last).sum(dim=-1) - gradients.log_mass[heads]
            of_blocks, of_excess = blocks.average, torch.empty_like(excess)
            factor = work.total.reciprocal_().unsqueeze(2)
            of_first = merge.far_back(of_last.mT, of_far, of_blocks, factor).mT
            lost = merge.far_back(lost.unsqueeze(1), excess, of_excess, factor).squeeze(1)
            work.keys_back(of_blocks, of_excess)
            of["average"][heads] = of_first
            of["log_mass"][heads] = (of_first * problem.average[heads]).sum(dim=-1) - lost
        if not work.is_of_query_itself:
            work.take_out(work.of_query, of["query"])
        of["key"][heads] = work.of_key[:, work.own]
        of["value"][heads] = work.of_value[:, work.own]
        of["sink_key"][heads] = work.of_sink_key
        of["sink_value"][heads] = work.of_sink_value
        of["heavy_key"][heads] = work.of_heavy_key * problem.scale
        of["heavy_value"][heads] = work.of_heavy_value
        if with_directions:
            for name in SHARED:
                part, whole = getattr(work, f"of_{name}"), of[name]
                if len(whole) > 1:
                    whole[heads] = part
                else:
                    whole += part.sum(dim=0, keepdim=True)
    buffers.trim(KEPT_IN_TRAINING)
    return list(of.values())


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? hidden_near, Tensor? hidden_far, "
    "Tensor sink_key, Tensor sink_value, Tensor sink_start, "
    "Tensor heavy_key, Tensor heavy_value, Tensor heavy_hidden, "
    "Tensor query_directions, Tensor? query_shift, Tensor? query_matrix, Tensor? query_linear, "
    "Tensor? query_lengths, Tensor? query_surplus, "
    "Tensor key_directions, Tensor? key_shift, Tensor? key_matrix, Tensor? key_linear, "
    "Tensor? key_lengths, Tensor? key_surplus, "
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
        room_of_outputs(problem.query, problem.value),
        problem.average.new_empty(*shape, 1),
        torch.empty_like(problem.log_mass),
        torch.empty_like(problem.average),
        problem.average.new_empty(*shape, problem.limits),
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
    buffers.trim(KEPT_IN_TRAINING)
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
    far, 4·dim² for sides with a matrix (`theory.cost.favor_operations`), or a quarter of that where
    their norms are known.
    """
    return BlockAttention(*(plain if needs_formula() else _block_attention)(*problem))
