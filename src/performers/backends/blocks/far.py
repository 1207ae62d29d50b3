"""What is far of each block: sums of whole blocks, from the left and from the right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.blocks.sizes import LOG2_E
from performers.backends.fused_softmax import HIDDEN

__all__ = ["Averages", "Merge"]


class Averages(NamedTuple):
    """Of every block, or of what is far of it: s and A, or s̃ and F.

    Features come last: a factor for each then runs along the memory.
    """

    log_mass: Float[Tensor, "heads blocks num_features"]
    average: Float[Tensor, "heads blocks value_dim num_features"]


def log_cumulative_sum(
    log_mass: Float[Tensor, "heads blocks num_features"],
) -> Float[Tensor, "heads blocks num_features"]:
    """`logcumsumexp` over blocks, of which no sum knows a later one.

    Sums of exponentials in float64 take a third of its time, as far as there are any.
    """
    wide = log_mass.double()
    # At least what a block without keys has, whose logits are hidden in base 2.
    total = wide.exp().cumsum(dim=1).log_().clamp_(min=HIDDEN / LOG2_E).to(log_mass.dtype)
    is_in_reach = (wide.abs() < 600) | (wide < HIDDEN / 2)
    if bool(is_in_reach.all()):
        return total
    return total.where((~is_in_reach).cumsum(dim=1) == 0, log_mass.logcumsumexp(dim=1))


class Scan:
    """Blocks added up one after another: log-masses after 0, 1, 2, … of them, and the share of each
    in what there is with it; `kept` is that of what was there."""

    def __init__(self, first: Tensor, log_mass: Float[Tensor, "heads blocks num_features"]) -> None:
        total = log_cumulative_sum(torch.cat([first.unsqueeze(1), log_mass], dim=1))
        self.log_mass = total
        self.kept = (total[:, :-1] - total[:, 1:]).exp_().unsqueeze(-2).unbind(1)
        self.added = (log_mass - total[:, 1:]).exp_().unsqueeze(-2).unbind(1)

    def step_back(self, index: int, gradient: Tensor, of_block: Tensor) -> None:
        """The gradient of an average, back over the step that added a block."""
        of_block.addcmul_(gradient, self.added[index])
        gradient.mul_(self.kept[index])


class Merge:
    """What is far of each block: the state and the blocks before it, and those after it."""

    def __init__(self, log_mass: Tensor, first: Tensor, is_causal: bool) -> None:
        self.count, self.is_causal = log_mass.shape[1], is_causal
        place = torch.arange(self.count, device=first.device)
        self.before = Scan(first, log_mass)
        self.log_mass = self.before.log_mass[:, (place - 1).clamp(min=0)]
        if not is_causal:
            self.after = Scan(torch.full_like(first, HIDDEN), log_mass.flip(1))
            later = self.after.log_mass[:, (self.count - 2 - place).clamp(min=0)]
            parts = self.log_mass, later
            self.log_mass = torch.logaddexp(*parts)
            self.shares = [(part - self.log_mass).exp_().unsqueeze(-2).unbind(1) for part in parts]

    def far(self, first: Tensor, blocks: Tensor, far: Tensor) -> Tensor:
        """Write F of each block, of the average before the sequence and those of blocks; the
        average of all."""
        average, rows, added = blocks.unbind(1), far.unbind(1), self.before.added
        for block in range(self.count):
            if block < 2:
                rows[block].copy_(first)
            else:
                torch.lerp(rows[block - 1], average[block - 2], added[block - 2], out=rows[block])
        last = rows[-1]
        for block in range(max(0, self.count - 2), self.count):
            last = torch.lerp(last, average[block], added[block])
        if not self.is_causal:
            after = torch.zeros_like(first)
            for block in reversed(range(self.count - 2)):
                after.lerp_(average[block + 2], self.after.added[self.count - 3 - block])
                rows[block].lerp_(after, self.shares[1][block])
        return last

    def far_back(self, of_last: Tensor, of_far: Tensor, of_blocks: Tensor) -> Tensor:
        """The same way back, for gradients of averages or anything that goes with them; `of_blocks`
        begins as 0. The gradient of the first."""
        running, of_rows, of_average = of_last.clone(), of_far.unbind(1), of_blocks.unbind(1)
        for block in reversed(range(max(0, self.count - 2), self.count)):
            self.before.step_back(block, running, of_average[block])
        for block in reversed(range(self.count)):
            if self.is_causal:
                running.add_(of_rows[block])
            else:
                running.addcmul_(of_rows[block], self.shares[0][block])
            if block >= 2:
                self.before.step_back(block - 2, running, of_average[block - 2])
        if not self.is_causal:
            after = torch.zeros_like(running)
            for block in range(self.count - 2):
                after.addcmul_(of_rows[block], self.shares[1][block])
                self.after.step_back(self.count - 3 - block, after, of_average[block + 2])
        return running
