"""Derivatives of the operators that are written by hand.

PyTorch knows their backward pass, and no more: it would take a tangent of forward mode for 0, and
`torch.func` does not know how to batch or transform them. So each operator is also a formula in
plain PyTorch, slower and with more memory, which PyTorch can differentiate in every way. It stands
in for the operator where `needs_formula()`, and for its backward pass where that is differentiated
in its turn (`create_graph=True`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "is_differentiated",
    "is_traced",
    "is_transformed",
    "needs_formula",
    "plain_gradients",
    "refuse_second_derivative",
]


def is_transformed() -> bool:
    """Whether operators must be plain PyTorch: inside a transform of `torch.func`, or where forward
    mode has a level open. torch.compile can trace this."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_formula() -> bool:
    """Whether an operator has to be its formula: what ONNX cannot be told otherwise, too."""
    return is_transformed() or torch.onnx.is_in_onnx_export()


def is_traced() -> bool:
    """Whether no number in a tensor may be read: a graph is made that serves others, too, or a
    transform has put tensors of tensors there."""
    return torch.compiler.is_compiling() or needs_formula()


def is_differentiated() -> bool:
    """Whether what a backward pass finds must be differentiable. Asked within one."""
    return torch.is_grad_enabled() or is_transformed()


def plain_gradients(
    plain: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Any],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of those arguments that are `needed`, through the formula of an operator.

    `gradients`: of its outputs. What is found is a differentiable function of both.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: the way back ends at them, while they depend on what arguments do.
        inputs = [x.view_as(x) if need else x for x, need in zip(arguments, needed, strict=True)]
        pairs = [
            (out, gradient)
            for out, gradient in zip(plain(*inputs), gradients, strict=True)
            if gradient is not None and out.requires_grad
        ]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        found: Iterator[Tensor | None] = iter([None] * len(wanted))
        if pairs and wanted:
            outputs, of_outputs = zip(*pairs, strict=True)
            found = iter(
                torch.autograd.grad(
                    outputs, wanted, of_outputs, create_graph=create_graph, allow_unused=True
                )
            )
    return tuple(next(found) if need else None for need in needed)


def refuse_second_derivative(what: str) -> Callable[..., Any]:
    """For the backward operator of `what`, in place of a derivative of its own."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{what} has a first derivative only, by backward(). For second derivatives pass "
            'backend="chunked" to the attention call.'
        )

    return refuse
