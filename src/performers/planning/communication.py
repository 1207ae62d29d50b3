"""Bytes that a device sends in one step, in rings of N devices.

To sum over devices and give each the result, one sends 2 (N − 1) / N of the bytes; to gather from
all, or to sum and keep a part, (N − 1) / N. Sequence parallel attention exchanges states, whose
numbers docs/distributed.md lists; they do not grow with the length.
"""

from __future__ import annotations

from performers.planning.activations import attention_of
from performers.planning.attention import WIDE, HeadsOf
from performers.planning.workload import Workload

__all__ = ["gathered_by_attention", "sent_by_attention", "sent_of_parts", "sent_of_sums"]


def sent_of_sums(whole: int | float, devices: int) -> int | float:
    return 2 * whole * (devices - 1) / devices


def sent_of_parts(whole: int | float, devices: int) -> int | float:
    return whole * (devices - 1) / devices


def sent_by_attention(workload: Workload, devices: int) -> int | float:
    """Of all layers, forward and backward, over sequences that are split."""
    once = sum(
        _sent_by_heads(group, workload.config.is_decoder, devices)
        for layer in workload.layers
        for group in attention_of(workload, layer)
    )
    times = 2 if workload.is_checkpointed else 1  # the forward pass, which is half of it
    return workload.accumulation * workload.batch * once * (1 + times) / 2


def gathered_by_attention(workload: Workload, devices: int) -> int:
    """Bytes of the states of all devices that one layer has at a time: causal attention gathers
    them, and has them as they came, merged, and their gradient.
    """
    states = max(
        sum(group.state for group in attention_of(workload, layer)) for layer in workload.layers
    )
    return WIDE * workload.batch * states * (3 * devices if workload.config.is_decoder else 2)


def _sent_by_heads(group: HeadsOf, is_causal: bool, devices: int) -> int | float:
    """Forward and backward, of one sequence."""
    sums = WIDE * group.state
    return 2 * (devices - 1) * sums if is_causal else 2 * sent_of_sums(sums, devices)
