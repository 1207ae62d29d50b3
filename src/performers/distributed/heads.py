"""`shard_heads`: a model whose heads are shared out over ranks, with the widths of its MLPs.

    x ─► rows of W_q, W_k, W_v ─► attention of these heads ─► columns of W_o ─► sum over ranks ─► x

What heads compute does not depend on each other, so attention itself exchanges nothing. All heads
of a layer have one ω, a function of (seed, layer, number of redraws), so each rank draws it by
itself; what sharp features have learned of each head goes with the head.

Source: Shoeybi et al. 2019, "Megatron-LM" (the cut of weights); torch's DTensor does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from performers.checks import check_instance
from performers.convert.layer import FavorLayer
from performers.distributed.agreement import agree
from performers.distributed.collectives import group_of, on_all_ranks, rank_in, size_of
from performers.distributed.models import attending_modules, identities
from performers.models.modeling import PerformerPreTrainedModel
from performers.nn.mechanisms import Favor
from performers.nn.sharp import SharpFeatures

__all__ = ["check_divides", "of_all_heads", "plan_of_heads", "shard_heads"]

# By the names of modules within the model without its head, as transformers' configs have them.
OWN_PLAN = {
    **dict.fromkeys((f"layers.*.attention.{name}_proj" for name in "qkv"), "colwise"),
    "layers.*.attention.out_proj": "rowwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
STYLES: dict[str, type[ColwiseParallel | RowwiseParallel]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
}
# What is shared out, in the words of configurations.
SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def shard_heads(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Share out the heads of a model over the ranks of a mesh of one dimension; the model itself.

    For Performers that attend by FAVOR+, and for models of transformers that `linearize` has
    converted in all layers and whose configuration has a plan for tensor parallelism. Every rank
    calls the model with the same batch, and gets the same outputs and loss. Weights of attention
    and MLPs become DTensors, of which each rank has a share and the share of the gradient; all
    others stay whole, with the same gradient on every rank. For FSDP2 besides, make a mesh of two
    dimensions: call this with one of them, then `fully_shard` with the other.

    Raises ValueError on every rank for a model whose attention is not FAVOR+ everywhere, for a
    number of ranks that does not divide its heads and the width of its MLPs, and where ranks have
    other weights or ω than the rest.
    """
    check_instance("model", model, nn.Module, "a Performer or a converted model of transformers")
    check_instance("mesh", mesh, DeviceMesh, "a torch.distributed.device_mesh.DeviceMesh")
    group = group_of(mesh)
    ranks, rank = size_of(group), rank_in(group)
    base = getattr(model, "base_model", None)
    attending: list[Favor | FavorLayer] = []
    plan: dict[str, ParallelStyle] = {}

    def describe() -> tuple[Mapping[str, object], int]:
        if not isinstance(base, nn.Module):
            raise ValueError(
                f"shard_heads takes a Performer or a model of transformers itself, and "
                f"{type(model).__name__} is a module around one, or none. Pass what is inside."
            )
        if any(isinstance(weight, DTensor) for weight in model.parameters()):
            raise ValueError(
                f"the weights of {type(model).__name__} are shared out already. Call shard_heads "
                "first, once, and FSDP2 after it."
            )
        attending.extend(attending_modules(model))
        check_divides(model, ranks)
        plan.update(plan_of_heads(model))
        return {"class of the model": type(model).__name__, **identities(model)}, 0

    agree(group, describe)
    assert base is not None, "it has been described"
    parallelize_module(base, mesh, plan)
    for module in attending:
        phi = module.feature_map
        if isinstance(phi, SharpFeatures) and phi.num_heads > 1:
            own = phi.num_heads // ranks
            phi.keep_heads(slice(rank * own, (rank + 1) * own))
    return model


def of_all_heads(model: nn.Module, mesh: DeviceMesh) -> dict[str, Tensor]:
    """By their names, the buffers of which `shard_heads` left to each rank those of its heads,
    whole.
    """
    group = group_of(mesh)
    return {
        f"{name}.{part}": on_all_ranks(buffer, group).flatten(0, 1)
        for name, module in model.named_modules()
        if isinstance(module, SharpFeatures)
        for part, buffer in module.of_heads().items()
    }


def check_divides(model: nn.Module, ranks: int) -> None:
    """Raise ValueError for a number of ranks that does not divide the heads of a model."""
    sizes = {name: getattr(model.config, name, None) for name in SHARED_OUT}
    given = {name: size for name, size in sizes.items() if size is not None}
    common = math.gcd(*given.values())
    if common % ranks:
        fitting = [count for count in range(1, common + 1) if common % count == 0]
        raise ValueError(
            f"heads can be shared out over {', '.join(map(str, fitting))} ranks here, and {ranks} "
            "are asked for: their number must divide "
            f"{', '.join(f'{name}={size}' for name, size in given.items())}. Take one of these "
            "numbers, and the other ranks for data or sequences."
        )


def plan_of_heads(model: nn.Module) -> dict[str, ParallelStyle]:
    """How the weights of a model are cut, by the names of modules within it without its head.

    Raises ValueError for a model whose configuration does not say it.
    """
    if isinstance(model, PerformerPreTrainedModel):
        words = OWN_PLAN
    else:
        words = getattr(model.config, "base_model_tp_plan", None) or {}
    unknown = sorted({style for style in words.values() if style not in STYLES})
    if not words or unknown:
        reason = f"a plan with {', '.join(unknown)}" if unknown else "no plan"
        raise ValueError(
            f"the heads of {type(model).__name__} cannot be shared out: its configuration has "
            f"{reason} for tensor parallelism (base_model_tp_plan), and {' and '.join(STYLES)} are "
            "understood here. Shard its weights with fully_shard, or split its sequences with "
            "performers.parallelize."
        )
    return {name: STYLES[style]() for name, style in words.items()}
