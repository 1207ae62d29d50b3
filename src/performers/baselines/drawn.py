"""Mechanisms with something random of their own, a function of (seed, layer, number of redraws)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from performers.functional.seeds import mixed_seed

__all__ = ["Drawn"]


class Drawn(nn.Module):
    """What mechanisms share that draw: `draw` fills their tensors, `redraw` fills them anew.

    The tensors are the same on every rank and device, and saved with the weights. Learned ones are
    drawn only once: `redraw` is for those that stay as they were drawn, as ω does. One that
    `is_shared` stands in all layers of a model that have its kind, which so learn and draw as one.
    """

    num_redraws: Tensor
    is_shared = False

    def __init__(self, seed: int, layer: int, is_learned: bool = False) -> None:
        super().__init__()
        self.is_learned = is_learned
        self.seed = seed
        self.layer = layer
        self.register_buffer("num_redraws", torch.zeros((), dtype=torch.int64, device="cpu"))

    def draw(self, generator: Generator) -> None:
        """Fill the tensors in place."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """The first draw of this seed and layer."""
        self.num_redraws.zero_()
        self._draw(None)

    def redraw(self, generator: Generator | None = None) -> None:
        """The next draw of this seed and layer, or one from `generator`; learned tensors stay."""
        if self.is_learned:
            return
        self.num_redraws += 1
        self._draw(generator)

    @torch.no_grad()
    def _draw(self, generator: Generator | None) -> None:
        own = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in own):
            return  # there is no memory to draw into; the weights are loaded later
        if generator is None:
            seed = mixed_seed(self.seed, self.layer, int(self.num_redraws))
            generator = Generator().manual_seed(seed)
        self.draw(generator)

    def own_tensor(self, name: str, *shape: int) -> None:
        """Make room for one of the tensors: a parameter if they are learned, else a buffer."""
        if self.is_learned:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        else:  # drawn at once, also where a model is built on the meta device
            self.register_buffer(name, torch.empty(shape, device="cpu"))
