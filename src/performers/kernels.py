"""f of generalized kernels, K(x, y) = E[f(ω·x) f(ω·y)]: a table of functions and derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["KERNELS", "Kernel"]

_aten = torch.ops.aten


class Kernel(NamedTuple):
    """f of a generalized kernel, K(x, y) = E[f(ω·x) f(ω·y)].

    `fn` maps projections to values. With `is_exponential` it maps them to the logarithms of values
    instead, so that attention can work in log space. `is_nonnegative` says that no value is below
    0. `backward` maps (gradient, projections) to gradient · f′(projections), and may write it over
    the gradient. The gradients of a kernel that has one are computed by hand
    (`performers.backends.kernel_tiles`), those of any other kernel by autograd. `into` is `fn` with
    a tensor to write to as its second argument, perhaps the first itself: memory that is in use
    already costs less than new.
    """

    fn: Callable[[Tensor], Tensor]
    is_nonnegative: bool = False
    is_exponential: bool = False
    backward: Callable[[Tensor, Tensor], Tensor] | None = None
    into: Callable[[Tensor, Tensor], Tensor] | None = None


def _itself(projected: Tensor) -> Tensor:
    return projected


def _elu_plus_one(projected: Tensor) -> Tensor:
    # exp(x) and not (exp(x) - 1) + 1, which has lost its digits at x = -8 and is 0 below -17: the
    # normalizer of a query with such features would be 0.
    return torch.where(projected > 0, projected + 1, projected.clamp(max=0).exp())


def _relu_into(projected: Tensor, room: Tensor) -> Tensor:
    return torch.clamp_min(projected, 0, out=room)


def _of_relu(gradient: Tensor, projected: Tensor) -> Tensor:
    # gradient · (projected > 0) would take seven times as long.
    return _aten.threshold_backward.grad_input(gradient, projected, 0, grad_input=gradient)


def _of_sigmoid(gradient: Tensor, projected: Tensor) -> Tensor:
    return _aten.sigmoid_backward(gradient, projected.sigmoid())


def _of_abs(gradient: Tensor, projected: Tensor) -> Tensor:
    return gradient * projected.sign()


def _of_elu(gradient: Tensor, projected: Tensor) -> Tensor:
    return _aten.elu_backward(gradient, 1, 1, 1, False, projected)


def _of_gelu(gradient: Tensor, projected: Tensor) -> Tensor:
    return _aten.gelu_backward(gradient, projected)


def _of_cos(gradient: Tensor, projected: Tensor) -> Tensor:
    return -gradient * projected.sin()


def _of_tanh(gradient: Tensor, projected: Tensor) -> Tensor:
    return _aten.tanh_backward(gradient, projected.tanh())


def _of_itself(gradient: Tensor, projected: Tensor) -> Tensor:
    return gradient


# Figure 16 of the paper, and the feature map of Katharopoulos et al. 2020 ("elu+1").
KERNELS: dict[str, Kernel] = {
    "relu": Kernel(torch.relu, is_nonnegative=True, backward=_of_relu, into=_relu_into),
    "exp": Kernel(_itself, is_nonnegative=True, is_exponential=True),
    "sigmoid": Kernel(torch.sigmoid, is_nonnegative=True, backward=_of_sigmoid),
    "abs": Kernel(torch.abs, is_nonnegative=True, backward=_of_abs),
    "elu+1": Kernel(_elu_plus_one, is_nonnegative=True, backward=_of_elu),
    "gelu": Kernel(F.gelu, backward=_of_gelu),
    "cos": Kernel(torch.cos, backward=_of_cos),
    "tanh": Kernel(torch.tanh, backward=_of_tanh),
    "identity": Kernel(_itself, backward=_of_itself),
}
