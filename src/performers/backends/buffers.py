"""Reusable memory for tiles, and the cuts that make tiles."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["CAPABILITIES", "Buffers", "buffers", "room_of_outputs", "slices"]

# Of the processor. An older torch cannot say.
CAPABILITIES: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()

KEPT_BYTES = 3 * 2**23  # of all buffers, between calls
KEPT_IN_TRAINING = 4 * 2**20  # less, because a model holds much between a pass and the next


class Buffers(threading.local):
    """Reusable memory for tiles, by name: on a CPU, getting new memory costs more than the
    computation in it.

    Every thread keeps its own, some MB, from call to call. Other devices have allocators that do
    the same, and know in which stream memory is free again.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._last: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        if like.device.type != "cpu":
            return like.new_empty(shape)
        key = (name, like.dtype)
        last = self._last.get(key)
        if last is not None and last.shape == shape:
            return last  # as for most tiles; a view costs as much as a small product
        size = math.prod(shape)
        with torch.inference_mode(False):  # or training could not write to it later
            if key not in self._flat or self._flat[key].numel() < size:
                self._flat[key] = torch.empty(size, dtype=like.dtype, device=like.device)
            self._last[key] = self._flat[key][:size].view(shape)
        return self._last[key]

    def trim(self, most: int) -> None:
        """Give back the largest, until no more than `most` bytes are left.

        A model has use for this memory between two calls; but to get all of it anew, page by page,
        is up to a sixth of the time of a call.
        """
        held = sum(flat.nbytes for flat in self._flat.values())
        for key, flat in sorted(self._flat.items(), key=lambda item: -item[1].nbytes):
            if held <= most:
                return
            held -= flat.nbytes
            del self._flat[key], self._last[key]

    def copied(self, name: str, x: Tensor, like: Tensor) -> Tensor:
        """x in the precision of another."""
        return self.take(name, x.shape, like).copy_(x)

    def product(self, name: str, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
        """factor · left @ right."""
        out = self.take(name, (left.shape[0], left.shape[1], right.shape[2]), left)
        if factor == 1.0:
            return torch.bmm(left, right, out=out)
        return torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)

    def joined(self, name: str, columns: list[Tensor]) -> Tensor:
        """The columns side by side."""
        width = sum(part.shape[-1] for part in columns)
        out = self.take(name, (*columns[0].shape[:-1], width), columns[0])
        return torch.cat(columns, dim=-1, out=out)


buffers = Buffers()


def room_of_outputs(
    query: Float[Tensor, "heads group length dim"],
    value: Float[Tensor, "heads key_length value_dim"],
) -> Float[Tensor, "heads group length value_dim"]:
    """New memory for outputs, in the order of the values'.

    Linear layers give (length, heads, dim). Where the values of one sequence still lie so, what
    joins the heads of its outputs is a view, not a copy that training keeps beside them.
    """
    heads, group, length, dim = *query.shape[:3], value.shape[-1]
    if value.stride(0) < value.stride(1):
        return query.new_empty(length, heads, group, dim).permute(1, 2, 0, 3)
    return query.new_empty(heads, group, length, dim)


def slices(stop: int, size: int, start: int = 0) -> Iterator[slice]:
    """Cuts of that size, the last as long as what is left."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
