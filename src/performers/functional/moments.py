"""Means and covariances of queries and keys, and the sample of a sequence that they come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["SAMPLED_POSITIONS", "Moments", "received_attention", "sampled"]

# The statistics of a sequence come from this many of its positions. It is a prime, so that evenly
# spaced positions do not always hit the same phase of something periodic, such as a row of an
# image.
SAMPLED_POSITIONS = 997

# The attention that keys receive is measured with this many queries of a sequence. With all queries
# the features of a pretrained model do not become sharper.
SAMPLED_QUERIES = 32


def sampled(
    x: Float[Tensor, "batch heads length dim"],
    mask: Bool[Tensor, "batch length"] | None = None,
    count: int = SAMPLED_POSITIONS,
) -> tuple[Float[Tensor, "batch heads sample dim"], Bool[Tensor, "batch sample"] | None]:
    """`count` positions of each sequence, evenly spaced among those that the mask shows, or all of
    these if there are no more than `count`. Returns the sample, in which unused places are 0, and a
    mask of the places that are used.

    The choice depends neither on what the mask hides nor on the other sequences of the batch.
    """
    length = x.shape[2]
    size = min(count, length)
    if torch.compiler.is_exporting():  # a graph serves lengths on either side of `count`
        size = count
        if mask is None:
            mask = x.new_ones(x.shape[0], length, dtype=torch.bool)
    rank = torch.arange(size, device=x.device)
    if mask is None:
        if length <= count:
            return x, None
        return x.index_select(2, (2 * rank + 1) * length // (2 * count)), None
    shown = mask.sum(dim=1, keepdim=True)
    chosen = shown.clamp(max=count)
    # The shown positions are cut into `chosen` equal parts; this is the middle of each.
    place = ((2 * rank + 1) * shown // (2 * chosen).clamp(min=1)).clamp(max=length - 1)
    # A stable sort puts the shown positions first, in their order: `place` counts among these.
    index = (~mask).byte().argsort(dim=1, stable=True).gather(1, place)
    mask = rank < chosen
    # take_along_dim would tie an exported graph to one batch and length.
    x = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.masked_fill_(~mask[:, None, :, None], 0.0), mask


@dataclass(frozen=True)
class Moments:
    """Number, weighted mean and covariance of vectors, per head; two sets merge exactly."""

    count: Float[Tensor, "*#batch"]
    mean: Float[Tensor, "*batch dim"]
    covariance: Float[Tensor, "*batch dim dim"]

    @classmethod
    def of(
        cls,
        x: Float[Tensor, "batch heads length dim"],
        mask: Bool[Tensor, "batch length"] | None = None,
        weight: Float[Tensor, "batch heads length"] | None = None,
    ) -> Moments:
        """Moments of each head of each sequence, over the positions that the mask shows. The hidden
        positions must be finite, because they are multiplied by 0.

        `weight`: the weight of each position, on any scale; None weighs all the same. The
        covariance sums deviations from the mean, which avoids cancellation, in float32 or better.
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        shown = x.new_ones(x.shape[0], 1, x.shape[2], 1)
        if mask is not None:
            shown = mask[:, None, :, None].to(x.dtype)
        share = shown if weight is None else shown * weight.detach().to(x.dtype).unsqueeze(-1)
        total = share.sum(dim=2, keepdim=True)
        # Where nothing is shown all shares are 0, and so are mean and covariance.
        share = share / total.where(total > 0, 1.0)
        mean = share.mT @ x
        # Half of the weight on each side, so that the product is symmetric and positive
        # semidefinite up to rounding.
        half = (x - mean).mul_(share.sqrt())
        count = shown.sum(dim=2).squeeze(-1).expand(x.shape[:2])
        return cls(count, mean.squeeze(2), half.mT @ half)

    def scaled(self, factor: float) -> Moments:
        """The moments of the vectors times a factor."""
        return Moments(self.count, self.mean * factor, self.covariance * factor**2)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of vectors together (Chan et al. 1979)."""
        count = self.count + other.count
        share = (other.count / count.clamp(min=1))[..., None]
        difference = other.mean - self.mean
        outer = difference.unsqueeze(-1) * difference.unsqueeze(-2)
        share_of_matrix = share.unsqueeze(-1)
        return Moments(
            count,
            self.mean + share * difference,
            (1 - share_of_matrix) * self.covariance
            + share_of_matrix * other.covariance
            + share_of_matrix * (1 - share_of_matrix) * outer,
        )

    def over_batch(self) -> Moments:
        """The moments of all sequences of the batch together."""
        total = Moments(*(part.new_zeros(part.shape[1:]) for part in vars(self).values()))
        for row in zip(*vars(self).values(), strict=True):
            total = total.merge(Moments(*row))
        return total


def received_attention(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch heads length dim"],
    query_mask: Bool[Tensor, "batch rows"] | None = None,
    key_mask: Bool[Tensor, "batch length"] | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "batch heads length"]:
    """Σ_i softmax_j(scale q_i·k_j): the weight of each key j in the outputs of 32 queries together.

    The queries are a sample of those that the mask shows. Hidden keys, which must be finite,
    receive nothing. The attention is bidirectional, also for causal models: with a causal mask
    their features would be no sharper.

    Cost: O(length · dim) per head, an eighth of what 256 features of the keys cost.
    """
    query, shown = sampled(query.detach(), query_mask, SAMPLED_QUERIES)
    scores = (query * scale) @ key.detach().mT
    if key_mask is not None:
        # Not −∞: if all keys of a sequence are hidden, softmax of −∞ alone would be NaN.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill_(~key_mask[:, None, None, :], lowest)
    attention = scores.softmax(dim=-1)
    if shown is not None:
        attention = attention * shown[:, None, :, None]
    return attention.sum(dim=2)
