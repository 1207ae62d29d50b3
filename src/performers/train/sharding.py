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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from performers.convert.sites import Sites
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel

__all__ = ["layers_of", "shard_weights", "share_out", "whole"]


def shard_weights(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Leave to this process its share of every weight, in place: each layer by itself, and then
    what is of no layer. `mesh`: (copies, shares), over which gradients are averaged.

    Raises ValueError for a weight that several layers share.
    """
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a Performer or of a model of transformers: what stands in lists, and attends.

    Raises ValueError for a weight that several layers share.
    """
    layers: list[nn.Module] = []
    if isinstance(model, PerformerPreTrainedModel):
        (stack,) = (module for module in model.modules() if isinstance(module, PerformerModel))
        layers += stack.layers
        title = f"attention={model.config.attention!r}"
    else:
        sites = Sites.of(model)
        title = type(model).__name__
        stacks = {n: x for n, x in model.named_modules() if isinstance(x, nn.ModuleList)}
        for site in sites:
            within = [name for name in stacks if site.name.startswith(f"{name}.")]
            if within:
                name = min(within, key=len)
                number = site.name.removeprefix(f"{name}.").partition(".")[0]
                layers.append(stacks[name][int(number)])
        layers = list(dict.fromkeys(layers))
    used = getattr(model.config, "num_hidden_layers", len(layers))
    weights = [weight for layer in layers for weight in set(layer.parameters())]
    if len(set(weights)) < len(weights) or len(layers) < used:
        raise ValueError(
            f"shard_weights, shard_heads and split_sequences take each layer by itself, and layers "
            f"of {title} have weights in common. Leave them out."
        )
    return layers


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
