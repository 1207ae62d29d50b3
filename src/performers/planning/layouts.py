"""A step of training over several devices: memory, operations and communication of each layout.

    data       every device has all weights, and sequences of its own
    sharded    every device has a part of the weights, and gathers a layer at a time (FSDP2)
    sequence   every device has all weights, and its piece of every sequence (`parallelize`)

Memory is that of tensors. What the driver, the process group and the gaps between tensors take
comes on top. Of P weights, P_l in layer l, N devices keep in float32

                  data, sequence           sharded
    weights       4 P                      4 P / N, and two layers for a moment
    gradients     4 P, and if N > 1 4 P    4 P / N, and two copies of a layer's for a moment; 4 P
                  of buckets               while several passes are summed
    AdamW         8 P                      8 P / N
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from performers.checks import check_choice, check_count
from performers.nn.mechanisms import Favor
from performers.planning.activations import (
    attention_of,
    bytes_of_head,
    bytes_of_inputs,
    bytes_of_layers,
)
from performers.planning.attention import WIDE
from performers.planning.communication import (
    gathered_by_attention,
    sent_by_attention,
    sent_of_parts,
    sent_of_sums,
)
from performers.planning.operations import operations_of_step
from performers.planning.workload import OPTIMIZERS, Workload

__all__ = ["LAYOUTS", "Plan", "largest_batch", "plan"]


@dataclass(frozen=True)
class Plan:
    """What one device needs.

    `weights`, `gradients`, `optimizer`, `activations`: bytes, the most that each is when it is
    needed. `peak`: the most that all are together, and `moment` when that is. `operations`, `sent`:
    floating-point operations of a step, and bytes that are sent in it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    moment: str
    operations: int | float
    sent: int | float


@dataclass(frozen=True)
class Layout:
    """`of_device`: the step of one of N devices, from that of a run; raises ValueError for what
    cannot be laid out so. `is_sharded`: whether weights are. `sent`, `gathered`: bytes of states
    that attention sends in a step, and that a layer gathers.
    """

    of_device: Callable[[Workload, int], Workload]
    is_sharded: bool = False
    sent: Callable[[Workload, int], int | float] = lambda workload, devices: 0
    gathered: Callable[[Workload, int], int] = lambda workload, devices: 0


def _its_own(workload: Workload, devices: int) -> Workload:
    return workload


def _piece(workload: Workload, devices: int) -> Workload:
    """The longest piece of every sequence."""
    if devices > workload.length:
        raise ValueError(
            f"a sequence of {workload.length} tokens cannot be split over {devices} devices: each "
            "needs at least one. Plan with fewer devices, or with a larger data.length."
        )
    for layer in workload.layers:
        for group in attention_of(workload, layer):
            if not isinstance(group.mechanism, Favor):
                raise ValueError(
                    "only FAVOR+ in all layers can attend to sequences that are split over "
                    f"devices, got {type(group.mechanism).__name__}."
                )
            if group.form == "near field":
                raise ValueError(
                    "a plan has no formulas for near fields over sequences that are split. Plan "
                    "with model.window_size=null."
                )
    return replace(workload, length=-(-workload.length // devices))


LAYOUTS: dict[str, Layout] = {
    "data": Layout(_its_own),
    "sharded": Layout(_its_own, is_sharded=True),
    "sequence": Layout(_piece, sent=sent_by_attention, gathered=gathered_by_attention),
}


def plan(workload: Workload, layout: str, devices: int) -> Plan:
    """What a device needs in this layout (a word of `LAYOUTS`).

    Raises ValueError for a workload that cannot be laid out so, and for parts of a model that no
    formula here is about.
    """
    check_choice("layout", layout, LAYOUTS)
    check_count("devices", devices)
    row = LAYOUTS[layout]
    own = row.of_device(workload, devices)
    total, sizes = own.weights, own.weights_of_layers()
    outside = total - sum(sizes)
    parts = devices if row.is_sharded else 1
    remembered, needed = OPTIMIZERS[own.optimizer]

    weights = WIDE * _share(total, parts) + own.bytes_of_buffers
    optimizer = WIDE * remembered * _share(total, parts)
    # What is outside of the layers stays as it was gathered; or buckets of gradients.
    reserved = own.width * outside if row.is_sharded else WIDE * total * (devices > 1)
    fixed = weights + optimizer + reserved

    # Gradients of several passes are summed before they are shared out.
    waits = own.accumulation > 1
    gradients = own.width * total if waits and row.is_sharded else WIDE * _share(total, parts)
    layers = bytes_of_layers(own)
    casts = [0 if row.is_sharded else one.casts for one in layers]  # shards are gathered as casts
    kept = [one.kept + cast for one, cast in zip(layers, casts, strict=True)]
    stored = [one.read for one in layers] if own.is_checkpointed else kept
    head, of_loss = bytes_of_head(own)
    activations = bytes_of_inputs(own) + head + sum(stored)
    there = gradients if waits else 0
    moments = {"the loss": fixed + there + activations + of_loss}

    held, in_layers = activations - head, 0
    there = gradients if waits else WIDE * _share(outside, parts)
    for number in reversed(range(len(layers))):
        size = sizes[number]
        mlp = own.layers[number].mlp
        # Of shares, whole gradients until the layer is done; else `there` has them.
        grown = own.width if row.is_sharded and not waits else 0
        passing = row.gathered(own, devices) + max(
            layers[number].of_mlp + grown * mlp.down_proj.weight.numel(),
            layers[number].of_attention + grown * sum(x.numel() for x in mlp.parameters()),
        )
        recomputed = kept[number] if own.is_checkpointed else 0
        passing += recomputed
        if row.is_sharded:
            # Its weights and those fetched for the next layer. At its end, where nothing that it
            # kept is left, one of them and two copies of its gradient.
            at_end = own.width * size * (2 if waits else 3) + recomputed - kept[number]
            passing = max(passing + own.width * size * 2, at_end)
        there += 0 if waits else WIDE * _share(size, parts)
        in_layers = max(in_layers, fixed + there + held + passing)
        held -= stored[number]
    moments["a backward pass"] = in_layers
    moments["the optimizer"] = fixed + WIDE * _share(total, parts) * (1 + needed)
    moment = max(moments, key=lambda name: moments[name])
    return Plan(
        weights=weights + (reserved if row.is_sharded else 0),
        gradients=gradients + (0 if row.is_sharded else reserved),
        optimizer=optimizer,
        activations=activations,
        peak=moments[moment],
        moment=moment,
        operations=operations_of_step(own),
        sent=_sent_weights(own, row.is_sharded, devices) + row.sent(own, devices),
    )


def largest_batch(workload: Workload, layout: str, devices: int, memory: int) -> int:
    """The most sequences at a time whose peak fits into `memory` bytes; 0 if not even one does."""

    def fits(batch: int) -> bool:
        return plan(replace(workload, batch=batch), layout, devices).peak <= memory

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _share(numbers: int, parts: int) -> int:
    return math.ceil(numbers / parts)


def _sent_weights(workload: Workload, is_sharded: bool, devices: int) -> int | float:
    """Gradients that are summed; of shards, gathered weights and gradients that are summed."""
    total = workload.weights
    if not is_sharded:
        return sent_of_sums(WIDE * total, devices)
    in_layers = sum(workload.weights_of_layers())
    gathered = workload.width * (total + in_layers)  # those of the layers twice
    return sent_of_parts(workload.accumulation * gathered + WIDE * total, devices)
