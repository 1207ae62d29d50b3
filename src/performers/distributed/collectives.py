"""What ranks exchange, with gradients: sums over ranks, and tensors side by side.

The ranks are taken to share one objective, the sum of what each of them differentiates. So the
gradient of a tensor that went to all ranks is the sum of what comes back from them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.distributed.device_mesh import DeviceMesh

__all__ = ["group_of", "on_all_ranks", "over_ranks", "rank_in", "size_of", "summed"]


def group_of(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The group of a mesh with one dimension, or the group itself.

    Raises TypeError for anything else, ValueError for a mesh of several dimensions.
    """
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh of one dimension, or a ProcessGroup, got "
            f"{type(mesh).__name__}. Make one with torch.distributed.device_mesh.init_device_mesh."
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"the ranks are those of one dimension of a mesh, and this one has {mesh.ndim}: "
            f"{mesh.mesh_dim_names}. Pass one of them, such as mesh['sequence']."
        )
    return mesh.get_group()


def rank_in(group: dist.ProcessGroup) -> int:
    """The number of this process in the group, which is that of its piece."""
    return dist.get_rank(group)


def size_of(group: dist.ProcessGroup) -> int:
    """How many pieces there are."""
    return dist.get_world_size(group)


def on_all_ranks(x: Shaped[Tensor, "*shape"], group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, [ranks, *shape], whose shapes are equal."""
    gathered: Tensor = _Gathered.apply(x, group)
    return gathered


def summed(x: Shaped[Tensor, "*shape"], group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks, on each of them."""
    total: Tensor = _Summed.apply(x, group)
    return total


@torch.no_grad()
def over_ranks(
    x: Shaped[Tensor, "*shape"], group: dist.ProcessGroup, operation: dist.ReduceOp.RedOpType
) -> Shaped[Tensor, "*shape"]:
    """A reduction over all ranks, such as the maximum, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, operation, group)
    return x


class _Gathered(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty(size_of(group), *x.shape)
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # What rank r made of the tensor of rank s goes from r to s, and is added there.
        sent = gradient.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received.flatten(), sent.flatten(), group=ctx.group)
        return received.sum(dim=0), None


class _Summed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return over_ranks(x, group, dist.ReduceOp.SUM)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return over_ranks(gradient, ctx.group, dist.ReduceOp.SUM), None
