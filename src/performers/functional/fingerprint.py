"""What tells one draw of features from another, so that no state meets another than its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fingerprint"]


def fingerprint(kind: object, parts: tuple[Tensor, ...]) -> tuple[object, ...] | None:
    """The kind of features, and a number for the bits of each tensor that they are made from.

    Equal for equal numbers, in every copy, process and device. A GPU is waited for, so keep it
    while the tensors do not change. None where the numbers cannot be asked for: while compiling,
    and of tensors on the meta device, of inference mode, of a batch of `torch.func.vmap`, or that
    learn.
    """
    if torch.compiler.is_compiling():
        return None
    for part in parts:
        if part.is_meta or part.is_inference() or part.requires_grad:
            return None
        if torch._C._functorch.is_batchedtensor(part):
            return None
    return (kind, *map(_number, parts))


def _number(x: Tensor) -> int:
    """Σ_i (i-th word) · (i-th odd number) · a large odd number, modulo 2⁶⁴."""
    words = x.detach().contiguous().flatten().view(torch.int32).long()
    odd = 2 * torch.arange(len(words), device=x.device) + 1
    return int((words * odd * 0x9E3779B97F4A7C1).sum())
