"""φ: feature maps whose inner products estimate a kernel, E[φ(x)·φ(y)] = K(x, y).

Softmax kernel exp(x·y), Section 2.3 of the paper: `positive_features` (the + of FAVOR+),
`hyperbolic_features`, `trigonometric_features`. Any other kernel, Section 2.2: `kernel_features`.

All return `Features`, which keep the exponents of φ apart from its values; `.dense()` gives φ
itself. The temperature is the caller's: for softmax(QKᵀ/√dim) scale queries and keys by dim**-0.25,
as `favor_attention` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from performers.checks import check_choice, check_number, check_omega, check_rows, described
from performers.kernels import KERNELS, Kernel
from performers.typing import Features, LogLinearSide

__all__ = [
    "KERNELS",
    "Kernel",
    "hyperbolic_features",
    "hyperbolic_side",
    "kernel_features",
    "positive_features",
    "positive_side",
    "trigonometric_features",
]


def positive_features(
    x: Float[Tensor, "*batch length dim"],
    omega: Float[Tensor, "num_projections dim"],
) -> Features:
    r"""Positive random features of the softmax kernel: E[φ(x)·φ(y)] = exp(x·y).

        φ(x) = exp(-‖x‖²/2) / √m · (exp(ω₁·x), …, exp(ω_m·x)),    ω_i ~ N(0, I)

    Rows of ω may be orthogonal if each keeps its marginal; `draw_projection` sees to that.

    Cost: O(length · m · dim).  Source: Choromanski et al. 2021, Lemma 1 (Eq. 7).

    >>> x, omega = torch.zeros(1, 4), torch.randn(2, 4)
    >>> positive_features(x, omega).dense()
    tensor([[0.7071, 0.7071]])
    """
    check_omega(x, omega)
    return positive_side(omega.to(x.dtype)).log_linear(x).features()


def positive_side(omega: Float[Tensor, "num_projections dim"]) -> LogLinearSide:
    """`positive_features` before the product with ω."""
    return LogLinearSide(omega, -math.log(len(omega)) / 2)


def hyperbolic_features(
    x: Float[Tensor, "*batch length dim"],
    omega: Float[Tensor, "num_projections dim"],
) -> Features:
    r"""Positive features that use every ω with both signs: E[φ(x)·φ(y)] = exp(x·y), width 2m.

        φ(x) = exp(-‖x‖²/2) / √(2m) · (exp(ω₁·x), …, exp(ω_m·x), exp(-ω₁·x), …, exp(-ω_m·x))

    The variance is never larger than that of `positive_features` with 2m independent projections.

    Cost: O(length · m · dim).  Source: Choromanski et al. 2021, Lemma 1 and Lemma 2.
    """
    check_omega(x, omega)
    return hyperbolic_side(omega.to(x.dtype)).log_linear(x).features()


def hyperbolic_side(omega: Float[Tensor, "num_projections dim"]) -> LogLinearSide:
    """`hyperbolic_features` before the product with ω."""
    return positive_side(torch.cat([omega, -omega]))


def trigonometric_features(
    x: Float[Tensor, "*batch length dim"],
    omega: Float[Tensor, "num_projections dim"],
) -> Features:
    r"""Random Fourier features of the softmax kernel: E[φ(x)·φ(y)] = exp(x·y), width 2m.

        φ(x) = exp(‖x‖²/2) / √m · (sin ω₁·x, …, sin ω_m·x, cos ω₁·x, …, cos ω_m·x)

    The estimate is unbiased, but can have any sign. Where exp(x·y) is small its variance is not,
    and the normalizer of attention may vanish or turn negative. These features exist for
    comparison; train with positive features.

    Cost: O(length · m · dim).  Source: Choromanski et al. 2021, Section 2.3 (Eq. 5).
    """
    projected = _project(x, omega)
    return Features(
        values=torch.cat([projected.sin(), projected.cos()], dim=-1) / math.sqrt(len(omega)),
        log_rows=_half_square_norm(x),
    )


def kernel_features(
    x: Float[Tensor, "*batch length dim"],
    omega: Float[Tensor, "num_projections dim"] | None,
    fn: str | Callable[[Tensor], Tensor] | Kernel = "relu",
    epsilon: float = 1e-3,
) -> Features:
    r"""Features of a generalized kernel, K(x, y) = E[(f(ω·x) + ε)(f(ω·y) + ε)].

        φ(x) = (f(ω₁·x) + ε, …, f(ω_m·x) + ε) / √m,    without ω:  φ(x) = f(x) + ε

    `fn` is a name in `KERNELS`, any elementwise callable, or a `Kernel`. `epsilon` is the paper's
    kernel epsilon. It is a part of the kernel, which prevents that all ReLU features are 0; it is
    not there for the arithmetic.

    Cost: O(length · m · dim).  Source: Choromanski et al. 2021, Section 2.2 and Appendix A.4.
    """
    check_rows("x", x)
    check_number("epsilon", epsilon, or_zero=True)
    kernel = resolve_kernel(fn)
    projected = x if omega is None else _project(x, omega)
    columns = 1 if omega is None else len(omega)
    values = kernel.fn(projected)
    if not isinstance(values, Tensor) or values.shape != projected.shape:
        came = tuple(values.shape) if isinstance(values, Tensor) else described(values)
        raise ValueError(
            "fn must be elementwise, and give a tensor of the shape that it gets: that is "
            f"{tuple(projected.shape)}, and it gave {came}."
        )
    if kernel.is_exponential:
        log_values = values
        if epsilon > 0:
            log_values = torch.logaddexp(log_values, log_values.new_tensor(math.log(epsilon)))
        return Features(log_values=log_values - math.log(columns) / 2)
    return Features(values=(values + epsilon) / math.sqrt(columns))


def resolve_kernel(fn: str | Callable[[Tensor], Tensor] | Kernel) -> Kernel:
    """The `Kernel` with this name, or of a callable, about which nothing is assumed."""
    if isinstance(fn, Kernel):
        return fn
    if callable(fn):
        return Kernel(fn)
    check_choice("kernel", fn, KERNELS)
    return KERNELS[fn]


def _project(x: Tensor, omega: Tensor) -> Tensor:
    check_omega(x, omega)
    return x @ omega.to(x.dtype).mT


def _half_square_norm(x: Tensor) -> Tensor:
    return x.square().sum(dim=-1, keepdim=True) / 2
