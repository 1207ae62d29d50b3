"""What torch.autocast makes of the inputs of attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["autocast_inputs", "without_autocast"]


def autocast_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch.autocast hands them to `scaled_dot_product_attention`.

    Where autocast is on, all of them in its dtype, but for float64, which it leaves alone; else as
    they came. In models the three differ: rotary embeddings and norms turn queries and keys back
    to float32, and values come from a linear layer.
    """
    return _cast(query), _cast(key), _cast(value)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where `x` is computed with as it is; devices such as "meta" have no autocast to switch off.

    with without_autocast(x): ...
    """
    device = x.device.type
    if _has_autocast(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _cast(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):  # it is refused by name where the three are checked
        return x
    device = x.device.type
    if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
        return x
    is_cast = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x


def _has_autocast(device: str) -> bool:
    """Whether torch.autocast knows a device. Before torch 2.9 a graph cannot ask: what is compiled
    runs on devices that it knows."""
    if device == "meta":
        return False
    return torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
