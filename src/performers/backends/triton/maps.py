"""Which feature maps the kernels can compute, and what they need to know of one."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.typing import FeatureMap, LogLinearSide, elementwise, is_log_linear

__all__ = ["SUPPORTED", "KernelMap", "for_heads", "kernel_map"]

SUPPORTED = (
    "positive, hyperbolic and sharp features of the softmax kernel, relu and elu+1 kernel features"
)


class KernelMap(NamedTuple):
    """φ of queries and of keys: for `kind` "exp" their sides, which share directions and tilt.

    Otherwise φ_m(x) = (f(x·directions_m) + epsilon) e^constant, `kind` the name of f.
    """

    query: LogLinearSide
    key: LogLinearSide
    kind: str = "exp"
    epsilon: float = 0.0


def kernel_map(phi: FeatureMap, like: Tensor) -> KernelMap | None:
    """What the kernels need to know of a feature map of theirs, for queries such as `like`; None of
    another."""
    if is_log_linear(phi):
        return KernelMap(phi.query_side(torch.float32), phi.key_side(torch.float32))
    form = elementwise(phi)
    if form is None or form.kernel not in ("relu", "elu+1"):
        return None
    if form.directions is None:
        side = LogLinearSide(torch.eye(like.shape[-1], device=like.device), 0.0)
    else:
        side = LogLinearSide(form.directions, -math.log(len(form.directions)) / 2)
    return KernelMap(side, side, form.kernel, form.epsilon)


def for_heads(
    x: Float[Tensor, "*heads rows columns"], batch: int, heads: int
) -> Float[Tensor, "#all_heads rows columns"]:
    """What belongs to a side, once for all heads or once for each of all sequences."""
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x.expand(batch, heads, *x.shape[-2:]).flatten(0, 1)
