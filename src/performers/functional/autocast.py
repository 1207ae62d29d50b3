"""What torch.autocast makes of the inputs of attention."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_inputs"]


def autocast_inputs(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as torch.autocast hands them to `scaled_dot_product_attention`.

    Where autocast is on, all of them in its dtype, but for float64, which it leaves alone; else as
    they came. In models the three differ: rotary embeddings and norms turn queries and keys back
    to float32, and values come from a linear layer.
    """
    return _cast(query), _cast(key), _cast(value)


def _cast(x: Tensor) -> Tensor:
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x
    is_cast = x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if is_cast else x
