"""Loops over tiles in graphs that serve every length.

An exported graph cannot hold a Python loop whose number of steps is a length. torch.export gets one
tile in its place, and ONNX, which knows PyTorch's own operators alone, one Scan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Step", "folded", "tiles"]

Step = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


def tiles(size: int, x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Tiles of that size along a dimension; all of x while exporting.

    By `split`, whose gradient is one concatenation. The gradient of a slice is as long as the whole
    tensor, and L / size of these would cost O(L²).
    """
    return (x,) if torch.compiler.is_exporting() else x.split(size, dim=dim)


def folded(step: Step, carry: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], ...]:
    """carry, out_t = step(carry, inputs_t) for one t after another along the first dimension: the
    last carry, and the outputs stacked."""
    if torch.onnx.is_in_onnx_export():
        return _scanned(step, carry, inputs)
    outputs = []
    for parts in zip(*(part.unbind(0) for part in inputs), strict=True):
        carry, out = step(carry, list(parts))
        outputs.append(out)
    return carry, [torch.stack(parts) for parts in zip(*outputs, strict=True)]


def _scanned(step: Step, carry: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The same as one operator, which the exporter translates to ONNX's Scan."""
    from torch._higher_order_ops import scan  # it has no public name yet

    def unaliased(carry: list[Tensor], parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        carry, out = step(carry, parts)
        return [x.clone() for x in carry], [x.clone() for x in out]

    # Detached: the exporter cannot take a scan with gradients apart, and ONNX graphs have none.
    # Cloned: of views the compiler of the step asks for the sizes of what they are views of.
    carry, inputs = ([x.detach().clone() for x in part] for part in (carry, inputs))
    carry, outputs = scan(unaliased, carry, inputs)
    return carry, outputs
