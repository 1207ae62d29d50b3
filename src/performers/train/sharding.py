"""Weights that are shared out over the processes of a run, by torch's FSDP2.

Each process keeps a share of every weight, of its gradient and of what the optimizer remembers of
it. Before a layer computes, the processes put its weights together, and let go of them afterwards.
The numbers are those of a run in which every process has all weights.

Checkpoints hold whole tensors, so that a run goes on on another number of processes, and without
sharding. (accelerate's own way to FSDP2 has a format of its own for them, and on a CPU it does
nothing, without a word.)
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer

from performers.models.modeling import PerformerModel
from performers.train.tasks import Model

__all__ = ["shard_weights", "share_out", "whole"]


def shard_weights(model: Model, mesh: DeviceMesh) -> None:
    """Leave to this process its share of every weight, in place: each layer by itself, and then
    what is of no layer. `mesh`: (copies, shares), over which gradients are averaged.

    Raises ValueError for a weight that several layers share.
    """
    (stack,) = (module for module in model.modules() if isinstance(module, PerformerModel))
    seen: set[Tensor] = set()
    for layer in stack.layers:
        weights = set(layer.parameters())
        if seen & weights:
            raise ValueError(
                f"shard_weights, shard_heads and split_sequences take each layer by itself, and "
                f"layers of attention={model.config.attention!r} have weights in common. Leave "
                "them out."
            )
        seen |= weights
    for layer in stack.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tree: Any, made: dict[int, Tensor | None] | None = None) -> Any:
    """The same nested dicts and lists, with whole tensors on the CPU in the place of shares; what
    was one tensor under two names is one again.

    Every process has to call it, for each tensor is put together from all of them. Those that are
    not the first get None for it. `made`: the tensors so far, by the identity of the shares.
    """
    made = {} if made is None else made
    if isinstance(tree, dict):
        return {key: whole(x, made) for key, x in tree.items()}
    if isinstance(tree, list):
        return [whole(x, made) for x in tree]
    if not isinstance(tree, DTensor):
        return tree
    if id(tree) not in made:
        # One dimension of the mesh at a time, the shares of heads last: as they were cut.
        inner = tree.placements[-1:] if tree.device_mesh.ndim > 2 else ()
        outer = [Replicate()] * (tree.device_mesh.ndim - len(inner))
        full = tree.redistribute(placements=[*outer, *inner]).full_tensor().detach()
        made[id(tree)] = full.cpu() if dist.get_rank() == 0 else None
    return made[id(tree)]


def share_out(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, with this process's shares in the place of whole tensors."""
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    state = {}
    for number, remembered in saved["state"].items():
        parameter = parameters[number]
        assert isinstance(parameter, DTensor), "the optimizer is one of shares"
        state[number] = {
            name: distribute_tensor(
                x.to(parameter.device),
                parameter.device_mesh,
                parameter.placements,
                src_data_rank=None,  # every process has read the whole
            )
            if x.shape == parameter.shape
            else x
            for name, x in remembered.items()
        }
    return saved | {"state": state}
