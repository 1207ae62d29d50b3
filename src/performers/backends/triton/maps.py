"""Which feature maps the kernels can compute, and what they need to know of one."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from performers.typing import FeatureMap

__all__ = ["SUPPORTED", "KernelMap", "kernel_map"]

SUPPORTED = "positive and hyperbolic softmax features, relu and elu+1 kernel features"


class KernelMap(NamedTuple):
    """φ_m(x) = f(x·directions_m) / √columns.

    f is exp(· − ‖x‖²/2) for `kind` "exp", else `kind` + epsilon.
    """

    directions: Tensor
    columns: int
    kind: str
    epsilon: float = 0.0


@runtime_checkable
class _Softmax(Protocol):
    omega: Tensor
    estimator: str


@runtime_checkable
class _Kernel(Protocol):
    omega: Tensor | None
    fn: object
    epsilon: float
    dim: int
    num_redraws: Tensor


def kernel_map(phi: FeatureMap) -> KernelMap | None:
    """What the kernels need to know of a feature map of theirs; None of another."""
    if isinstance(phi, _Softmax):
        if phi.estimator == "positive":
            return KernelMap(phi.omega, len(phi.omega), "exp")
        if phi.estimator == "hyperbolic":
            return KernelMap(torch.cat([phi.omega, -phi.omega]), 2 * len(phi.omega), "exp")
    elif isinstance(phi, _Kernel) and isinstance(phi.fn, str) and phi.fn in ("relu", "elu+1"):
        if phi.omega is None:
            eye = torch.eye(phi.dim, device=phi.num_redraws.device)
            return KernelMap(eye, 1, phi.fn, phi.epsilon)
        return KernelMap(phi.omega, len(phi.omega), phi.fn, phi.epsilon)
    return None
