"""Floating-point operations of a step, by the counts of `theory.cost`.

A weight that multiplies a matrix takes 2 operations per token forward and 4 backward. Attention
takes 3.5 times its forward pass in all (`performers.speed.operations`), and layers that are
computed again take a forward pass more.
"""

from __future__ import annotations

from performers.nn.mechanisms import Favor
from performers.nn.sharp import SharpFeatures
from performers.planning.activations import attention_of
from performers.planning.attention import HeadsOf
from performers.planning.workload import Workload
from performers.speed.operations import Operations
from performers.theory.cost import exact_operations, favor_operations

__all__ = ["operations_of_step"]


def operations_of_step(workload: Workload) -> int | float:
    """Of one device between two steps of the optimizer."""
    config = workload.config
    forward = 2.0 * sum(workload.products_of_layers()) * workload.tokens
    attention = Operations(
        sum(
            _of_heads(group, workload.length, config.is_decoder) * group.heads * workload.batch
            for layer in workload.layers
            for group in attention_of(workload, layer)
        )
    )
    head = 2.0 * config.hidden_size * config.vocab_size * workload.tokens
    once = 3 * (forward + head) + attention.with_backward().products
    if workload.is_checkpointed:
        once += forward + attention.products
    return workload.accumulation * once


def _of_heads(group: HeadsOf, length: int, is_causal: bool) -> int | float:
    """One head's forward pass."""
    if group.form == "none":
        return 0.0
    if not isinstance(group.mechanism, Favor):
        return exact_operations(length, group.dim, is_causal)
    return favor_operations(
        length,
        group.dim,
        group.num_features,
        group.mechanism.window_size,
        is_causal=is_causal,
        is_sharp=isinstance(group.mechanism.feature_map, SharpFeatures),
    )
