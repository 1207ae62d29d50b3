"""Bidirectional attention as two softmaxes, with the projections as landmarks.

Where log φ_m(x) = x·ω_m + (a number of the row), FAVOR+ is softmax attention twice:

    landmark m attends to the keys       S_m, s_m = softmax_j(ω_m·k_j + row_j) v_j,  its log-sum-exp
    query i attends to the landmarks     out_i = softmax_m(q_i·ω_m + s_m) S_m

So one operator does both, forward and backward, without storing a feature. Logits are in base 2, as
in that operator.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.call import Call
from performers.backends.fused_softmax import HAS_BFLOAT16, HIDDEN, fused_softmax
from performers.backends.graphs import tiles
from performers.state import LinearState
from performers.typing import LogLinearSide, is_log_linear

__all__ = ["attend", "refusal"]

LOG2_E = math.log2(math.e)
TILE = 512  # positions whose features are asked for at a time


def refusal(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    phi = call.phi
    if query.device.type != "cpu":
        return "its fused kernel is used on the CPU only"
    if call.is_causal or call.near is not None:
        return "it serves bidirectional attention without a window only"
    if call.has_state:
        return "it neither takes nor gives a LinearState"
    if not (is_log_linear(phi) and phi.is_softmax):
        return "it needs positive features of the softmax kernel"
    if query.numel() == 0 or key.numel() == 0:
        return "its fused kernel needs at least one query and one key"
    return None


def attend(
    call: Call,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """What `reference.attend` computes, up to rounding. The state, empty and unused, comes back."""
    phi = call.phi
    assert is_log_linear(phi), "`refusal` lets no other features in"
    side = functools.partial(_side, root=call.root, dtype=_product_dtype(query.dtype))
    keys = side(phi.key_side, key)
    queries = side(phi.query_side, query.flatten(2, 3))

    def directions(side: _Side) -> Tensor:
        return side.directions.expand(*key.shape[:2], -1, -1)

    bias = keys.offset
    if key_mask is not None:
        bias = bias.masked_fill(~key_mask[:, None, :, None], HIDDEN)
    found, log_sum = fused_softmax(
        directions(keys), keys.inputs, bias, value.to(keys.inputs.dtype), keys.curvature
    )
    # A tilt belongs to a feature, so as a bias of landmarks it is added once for each side.
    bias = sum((side.tilt for side in (keys, queries) if side.tilt is not None), log_sum)
    out, log_weight = fused_softmax(queries.inputs, directions(queries), bias, found)
    if not call.normalize:
        square = queries.inputs.to(bias.dtype).square().sum(dim=-1, keepdim=True)
        # Both softmaxes divide by their sums. Without D⁻¹ the second sum comes back, with what rows
        # share.
        out = out * (log_weight + queries.offset - queries.curvature * square).exp2()
    if key_mask is not None:
        # With all keys hidden the first softmax averages them all; the output has to be 0.
        out = out * key_mask.any(dim=1)[:, None, None, None]
    return out.unflatten(2, query.shape[2:4]), state


class _Side(NamedTuple):
    """log₂ φ of queries or keys: inputs·directions + tilt + offset − curvature ‖inputs‖²."""

    inputs: Float[Tensor, "batch heads length dim"]
    directions: Float[Tensor, "*heads num_features dim"]
    tilt: Float[Tensor, "*heads num_features 1"] | None
    offset: Float[Tensor, "batch heads length 1"]
    curvature: float


def _side(
    side_in: Callable[[torch.dtype], LogLinearSide],
    x: Float[Tensor, "batch heads length dim"],
    *,
    root: float,
    dtype: torch.dtype,
) -> _Side:
    """For plain features the inputs are √scale · x, and all rows have the same offset. Then x is
    passed on as it came, without rounding in bfloat16, and √scale is multiplied into the
    directions.

    Other features are asked for a tile at a time, because a tile stays in the cache.
    """
    wide = torch.promote_types(dtype, torch.float32)
    side = side_in(wide)
    if side.matrix is None and side.shift is None and isinstance(side.constant, float):
        inputs, stretch = x.to(dtype), root
        offset = x.new_full((1, 1, 1, 1), side.constant, dtype=wide)
    else:
        parts = [side.log_linear(part.to(wide) * root) for part in tiles(TILE, x, dim=2)]
        inputs, stretch = torch.cat([part.inputs.to(dtype) for part in parts], dim=2), 1.0
        offset = torch.cat(
            [part.offset + torch.zeros_like(part.inputs[..., :1]) for part in parts], dim=2
        )
    return _Side(
        inputs,
        side.directions * (stretch * LOG2_E),
        None if side.tilt is None else side.tilt.unsqueeze(-1) * LOG2_E,
        (offset * LOG2_E).expand(*x.shape[:-1], 1),
        # ‖√scale x‖²/2 = scale ‖x‖²/2, in base 2.
        stretch**2 * LOG2_E / 2,
    )


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the processor can multiply it; float16 could not hold the weights."""
    if dtype == torch.bfloat16 and HAS_BFLOAT16:
        return dtype
    return torch.promote_types(dtype, torch.float32)
