"""Attention over a sequence of which each rank has a piece: `favor_attention` and an exchange.

    bidirectional   rank 0: keys ─► state ┐                   ┌─► queries read the sum
                    rank 1: keys ─► state ┼─► sum of states ──┼─► queries read the sum
                    rank 2: keys ─► state ┘                   └─► queries read the sum

    causal          rank 0: keys ─► state ┐        ┌─► starts from nothing
                    rank 1: keys ─► state ┼─► all ─┼─► starts from the state of rank 0
                    rank 2: keys ─► state ┘        └─► starts from those of ranks 0 and 1

States do not grow with the length, so neither does what is exchanged. With a near field: `context`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from performers.backends import Call
from performers.checks import (
    check_attention_inputs,
    check_feature_map_parts,
    check_flags,
)
from performers.distributed.agreement import agree
from performers.distributed.collectives import group_of, rank_in, size_of
from performers.distributed.context import attend_in_context
from performers.distributed.pieces import Pieces
from performers.distributed.sharp import fitted_to_all
from performers.distributed.states import merged_where, total_state
from performers.functional import favor_attention
from performers.functional.autocast import autocast_inputs
from performers.functional.near_field import check_near_field
from performers.state import Maker, NearField
from performers.typing import FeatureMap, is_log_linear

__all__ = ["sequence_parallel_attention"]


@torch.compiler.disable(
    reason="ranks first say what they are about to do, and a graph cannot depend on the answers: "
    "compile without fullgraph=True"
)
def sequence_parallel_attention(
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    phi: FeatureMap,
    mesh: DeviceMesh | dist.ProcessGroup,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch length"] | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    window_size: int | None = None,
    num_sinks: int = 0,
    far: bool = True,
    far_limit: float | None = None,
    num_heavy: int = 0,
    backend: str | None = None,
) -> Float[Tensor, "batch heads length value_dim"]:
    """`favor_attention` of a sequence of which each rank of `mesh` has a piece, equal to it up to
    rounding; the output of this rank's piece.

    `mesh`: a mesh of one dimension, or one dimension of a mesh; its n-th rank has the n-th piece of
    every sequence. Pieces may differ in length, and need at least one token each. Other arguments
    are those of `favor_attention`, the same on all ranks, and mean what they mean there for the
    whole sequence: blocks of a near field, sinks and statistics of the call are those of the whole.

    Gradients go back to the rank that has a key: each rank gets, for its piece and for its copy of
    parameters, the gradient of the sum over ranks of what these differentiate. All ranks have to
    run the backward pass. Causal attention is exact: no rank sees a later piece, not even by
    rounding. A compiled graph breaks here.

    Raises ValueError or TypeError on every rank where one of them gets arguments that do not fit,
    or others than the rest. `num_heavy` is refused: which keys are heavy depends on the blocks
    before, one after the other. Differentiable once, by a backward pass.

    Cost: per head and layer num_features · (value_dim + 2) numbers are exchanged, causal attention
    gathers these of all ranks; with a near field also two blocks of keys and values of each rank.
    Nothing that is exchanged grows with the length. In causal attention the features of keys are
    computed once more.
    """
    group = group_of(mesh)
    query, key, value = autocast_inputs(query, key, value)
    options: dict[str, Any] = {
        "is_causal": is_causal,
        "scale": scale,
        "normalize": normalize,
        "enable_gqa": enable_gqa,
        "window_size": window_size,
        "num_sinks": num_sinks,
        "far": far,
        "far_limit": far_limit,
        "num_heavy": num_heavy,
        "backend": backend,
    }
    lengths = agree(group, partial(_described, query, key, value, phi, key_padding_mask, options))
    scale = phi.default_scale if scale is None else scale
    is_real = key_padding_mask
    if is_real is None:
        is_real = torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device)
    if far and not is_causal:
        estimated = is_real
        if num_sinks:
            estimated = is_real & (Pieces.of(is_real, group).positions() >= num_sinks)
        phi = fitted_to_all(phi, query, key, estimated, group, scale=scale, length=sum(lengths))
    if window_size is not None:
        near = NearField(min(window_size, sum(lengths)), min(num_sinks, sum(lengths)), far)
        dtype = torch.promote_types(value.dtype, torch.float32)
        call = Call(phi, scale, is_causal, normalize, near, False, dtype, far_limit)
        return attend_in_context(call, backend, query, key, value, is_real, group)
    attend = partial(
        favor_attention, phi=phi, scale=scale, normalize=normalize, enable_gqa=True, backend=backend
    )
    _, state = attend(
        key[:, :, :0], key, value, key_padding_mask=key_padding_mask, return_state=True
    )
    if not is_causal:
        state = total_state(state, group)
        return attend(query, key[:, :, :0], value[:, :, :0], initial_state=state)
    earlier = [rank < rank_in(group) for rank in range(size_of(group))]
    return attend(
        query,
        key,
        value,
        is_causal=True,
        key_padding_mask=key_padding_mask,
        initial_state=merged_where(state, earlier, group),
    )


def _described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    key_padding_mask: Tensor | None,
    options: dict[str, Any],
) -> tuple[dict[str, object], int]:
    """What all ranks must have in common, and the length of this rank's piece.

    Raises ValueError or TypeError for arguments that do not fit each other.
    """
    check_feature_map_parts(phi)
    check_attention_inputs(
        query, key, value, is_causal=options["is_causal"], key_padding_mask=key_padding_mask,
        enable_gqa=options["enable_gqa"], scale=options["scale"],
    )  # fmt: skip
    check_flags(normalize=options["normalize"], far=options["far"])
    check_near_field(
        options["window_size"], options["num_sinks"], options["far"], options["far_limit"],
        options["num_heavy"], query, key, is_causal=options["is_causal"], has_state=False,
        estimates_softmax=phi.is_softmax and is_log_linear(phi),
    )  # fmt: skip
    if options["num_heavy"]:
        raise ValueError(
            f"num_heavy={options['num_heavy']} needs all blocks one after the other, and ranks "
            "have them at the same time. Pass num_heavy=0, or do not split the sequence."
        )
    if query.shape[2] != key.shape[2] or query.shape[2] == 0:
        raise ValueError(
            "each rank needs one query per key, and at least one: query length is "
            f"{query.shape[2]}, key length is {key.shape[2]}. Split sequences into as many pieces "
            "as there are ranks, or take fewer ranks."
        )
    scale = phi.default_scale if options["scale"] is None else options["scale"]
    made_by = Maker.of(phi, scale)
    gradients = [torch.is_grad_enabled() and x.requires_grad for x in (query, key, value)]
    return {
        **options,
        "batch": len(query),
        "heads": (query.shape[1], key.shape[1]),
        "dim": (query.shape[3], value.shape[3]),
        "dtype": query.dtype,
        "device": query.device.type,
        "features (phi: seed, redraws, options)": (made_by, type(phi).__name__, phi.num_features),
        "need of gradients": gradients,
    }, query.shape[2]
