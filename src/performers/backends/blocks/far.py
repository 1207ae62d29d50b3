"""What is far of each block: sums of whole blocks, from the left and from the right."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from performers.backends.blocks.sizes import LOG2_E
from performers.backends.fused_softmax import HIDDEN

__all__ = ["Averages", "Merge"]


class Averages(NamedTuple):
    """Of every block, or of what is far of it: s and A, or s̃ and F.

    Features come last: a factor for each then runs along the memory. There is room for more blocks
    than the sequence has (`Sizes.room`), which have no mass.
    """

    log_mass: Float[Tensor, "heads room num_features"]
    average: Float[Tensor, "heads room value_dim num_features"]


def log_cumulative_sums(
    first: Float[Tensor, "heads num_features"],
    blocks: Float[Tensor, "heads blocks num_features"],
    group: int,
) -> tuple[Float[Tensor, "heads blocks_and_first num_features"], Tensor]:
    """`logcumsumexp` over the first and all blocks, and over the blocks of each group of so many.
    No sum knows a later block.

    Sums of exponentials in float64 take a third of its time, as far as there are any.
    """
    log_mass = torch.cat([first.unsqueeze(1), blocks], dim=1)
    wide = log_mass.double()
    mass, number = wide.exp(), log_mass.shape[1]
    sums = [mass.cumsum(dim=1), grouped(mass[:, 1:], group).cumsum(dim=2).flatten(1, 2)]
    # At least what a block without keys has, whose logits are hidden in base 2.
    total = torch.cat(sums, dim=1).log_().clamp_(min=HIDDEN / LOG2_E).to(log_mass.dtype)
    upto, in_group = total[:, :number], total[:, number:]
    is_beyond = (wide.abs() >= 600) & (wide >= HIDDEN / 2)
    if bool(is_beyond.any()):
        is_reached = is_beyond.cumsum(dim=1) == 0
        upto = upto.where(is_reached, log_mass.logcumsumexp(dim=1))
        is_reached = grouped(is_beyond[:, 1:], group).cumsum(dim=2) == 0
        of_groups = grouped(blocks, group).logcumsumexp(dim=2)
        in_group = in_group.where(is_reached.flatten(1, 2), of_groups.flatten(1, 2))
    return upto, in_group


def grouped(x: Shaped[Tensor, "heads blocks *_"], group: int) -> Tensor:
    """Blocks as [heads, groups, group, ·]."""
    return x.unflatten(1, (-1, group))


class Scan:
    """Blocks added up one after another, from the left or from the right.

    At first the blocks of each group by themselves, all groups at once; then, a group at a time,
    what is in those before it. That takes far fewer calls than there are blocks. Nothing is
    subtracted, and no average knows a block that is added later.
    """

    def __init__(
        self,
        of_block: Float[Tensor, "heads blocks num_features"],
        upto: Float[Tensor, "heads blocks_and_first num_features"],
        in_group: Float[Tensor, "heads blocks num_features"],
        group: int,
        is_from_right: bool = False,
    ) -> None:
        """Log-masses in the order of the scan: of each block, of the first 0, 1, 2, … of them, and
        of those of its group up to each."""
        self.group, self.is_from_right = group, is_from_right
        self.last = 0 if is_from_right else -1  # of a group, in memory
        self.of_block, self.in_group, self.before, self.upto = (
            grouped(x, group) for x in (of_block, in_group, upto[:, :-1], upto[:, 1:])
        )

    def factors(self, logarithm: Float[Tensor, "heads groups group num_features"]) -> Tensor:
        """As blocks lie in memory, of logarithms in the order of the scan."""
        logarithm = logarithm.flip(1, 2) if self.is_from_right else logarithm
        return logarithm.exp_().unsqueeze(3)

    def ordered(self, x: Tensor, dim: int) -> list[Tensor]:
        """Groups, or places in all groups, as the scan comes to them."""
        parts = list(x.unbind(dim))
        return parts[::-1] if self.is_from_right else parts

    def averages(self, first: Tensor, blocks: Tensor, out: Tensor) -> None:
        """Write the average of the first and of all blocks up to each. `out` may be `blocks`."""
        rows = grouped(out, self.group)
        places, found = self.ordered(grouped(blocks, self.group), 2), self.ordered(rows, 2)
        shares = self.ordered(self.factors(self.of_block - self.in_group), 2)
        if out is not blocks:
            found[0].copy_(places[0])
        for place in range(1, self.group):
            torch.lerp(found[place - 1], places[place], shares[place], out=found[place])
        shares = self.ordered(self.factors(self.in_group - self.upto), 1)
        before = [first.unsqueeze(1), *self.ordered(rows[:, :, self.last, None], 1)]
        for earlier, one, share in zip(before[:-1], self.ordered(rows, 1), shares, strict=True):
            torch.lerp(earlier, one, share, out=one)

    def back(self, gradient: Tensor) -> Tensor:
        """The way back: from the gradient of each average, to those of all that a block is part of
        (of which `shares` go to the block), in place. The gradient of the first average."""
        rows, kept = grouped(gradient, self.group), self.kept
        places = self.ordered(rows, 2)
        for place in reversed(range(self.group - 1)):
            places[place].addcmul_(places[place + 1], kept[place + 1])
        groups, starts = self.ordered(rows, 1), self.ordered(rows[:, :, -1 - self.last], 1)
        for index in reversed(range(len(groups) - 1)):
            groups[index].addcmul_(starts[index + 1].unsqueeze(1), self.reached[index])
        return starts[0] * self.ordered(kept[0], 1)[0]

    @cached_property
    def kept(self) -> list[Tensor]:
        """Of what is added up before each block, the part of it in what there is with the block;
        by places."""
        return self.ordered(self.factors(self.before - self.upto), 2)

    @cached_property
    def reached(self) -> list[Tensor]:
        """The same of what there is with each block, in that with the first of the next group; by
        groups."""
        return self.ordered(self.factors(self.upto[:, :-1] - self.upto[:, 1:, :1]), 1)

    @cached_property
    def shares(self) -> Float[Tensor, "heads blocks 1 num_features"]:
        """Of each block, in all that is added up to it."""
        return self.factors(self.of_block - self.upto).flatten(1, 2)


class Merge:
    """What is far of each block: the state and the blocks before it, and those after it.

    Row i of far averages has what ends with block i − 2 and what begins with block i + 2, so that
    either is a scan of rows that lie two apart. Rows and blocks have `Sizes.room`.
    """

    def __init__(
        self,
        log_mass: Float[Tensor, "heads room num_features"],
        first: Float[Tensor, "heads num_features"],
        count: int,
        group: int,
        is_causal: bool,
    ) -> None:
        self.count, self.is_causal = count, is_causal
        of_blocks, of_first = log_mass[:, :-2], first
        if not is_causal:  # both scans at once
            of_blocks = torch.cat([of_blocks, log_mass[:, 2:].flip(1)])
            of_first = torch.cat([first, torch.full_like(first, HIDDEN)])
        upto, in_group = log_cumulative_sums(of_first, of_blocks, group)
        heads = slice(len(first))
        before = upto[heads]
        self.before = Scan(of_blocks[heads], before, in_group[heads], group)
        self.last_mass = before[:, count]
        self.log_mass = torch.cat([before[:, :1], before], dim=1)
        if not is_causal:
            heads = slice(len(first), None)
            after = upto[heads]
            self.after = Scan(of_blocks[heads], after, in_group[heads], group, is_from_right=True)
            parts = self.log_mass, F.pad(after[:, 1:].flip(1), (0, 0, 0, 2), value=HIDDEN)
            self.log_mass = torch.logaddexp(*parts)
            self.parts = [(part - self.log_mass).exp_().unsqueeze(2) for part in parts]

    def far(self, first: Tensor, blocks: Tensor, far: Tensor) -> Tensor:
        """Write F of each block, of the average before the sequence and those of blocks, which are
        lost; the average of all."""
        far[:, :2] = first.unsqueeze(1)
        self.before.averages(first, blocks[:, :-2], far[:, 2:])
        last = far[:, self.count + 1].clone()
        if not self.is_causal:
            after = blocks[:, 2:]
            self.after.averages(torch.zeros_like(first), after, after)
            far[:, :-2].lerp_(after, self.parts[1][:, :-2])
        return last

    def far_back(
        self, of_last: Tensor, of_far: Tensor, of_blocks: Tensor, factor: Tensor
    ) -> Tensor:
        """The same way back, for gradients of averages or anything that goes with them. Those of
        blocks are written, times a factor of each feature of a block; those of rows are lost. The
        gradient of the first."""
        before, rows, of_first = of_blocks[:, :-2], of_far[:, 2:], of_far[:, :2]
        if self.is_causal:
            before.copy_(rows)
        else:
            torch.mul(rows, self.parts[0][:, 2:], out=before)
            of_first = of_first * self.parts[0][:, :2]
        before[:, self.count - 1] += of_last
        of_first = of_first.sum(dim=1) + self.before.back(before)
        before.mul_(self.before.shares * factor[:, :-2])
        if not self.is_causal:
            after = of_far[:, :-2].mul_(self.parts[1][:, :-2])
            self.after.back(after)
            of_blocks[:, -2:] = 0
            of_blocks[:, 2:].addcmul_(after, self.after.shares * factor[:, 2:])
        return of_first
