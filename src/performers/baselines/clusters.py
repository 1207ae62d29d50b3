"""Clusters of positions by k-means on the sphere, learned while a model trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from performers.baselines.drawn import Drawn
from performers.checks import check_count, check_number, described

__all__ = ["ClusterOptions", "Clusters"]


@dataclass(frozen=True)
class ClusterOptions:
    """`num_clusters`: best near √length. `decay`: λ of the moving average, from 0 to 1."""

    num_clusters: int = 16
    decay: float = 0.999

    def __post_init__(self) -> None:
        check_count("num_clusters", self.num_clusters)
        check_number("decay", self.decay, or_zero=True)
        if self.decay > 1:
            raise ValueError(f"decay must be from 0 to 1, got {described(self.decay)}.")


class Clusters(Drawn):
    """Centroids μ on the unit sphere, and the cluster of a key: argmax_c μ_c·k.

    μ_c ← λ μ_c + (1 − λ) · mean of the keys k/‖k‖ of cluster c,  back to length 1

    once for each backward pass through `follow` in training mode, which is when the centroids of a
    batch have served. So a forward pass changes nothing, one that is computed again for gradient
    checkpointing finds the same clusters, and evaluation leaves them alone. A cluster without keys
    stays. Centroids are buffers, drawn at random first and saved with the weights.

    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
    Section 4.1.
    """

    centroids: Tensor

    def __init__(
        self, options: ClusterOptions, dim: int, num_heads: int = 1, seed: int = 0, layer: int = 0
    ) -> None:
        """`num_heads`: key heads with centroids of their own; 1 for some that all share."""
        super().__init__(seed, layer)
        self.num_clusters = options.num_clusters
        self.decay = options.decay
        self.own_tensor("centroids", num_heads, options.num_clusters, dim)
        self.reset_parameters()

    def redraw(self, generator: Generator | None = None) -> None:
        """Nothing: centroids are learned, though by no gradient."""

    def draw(self, generator: Generator) -> None:
        drawn = torch.randn(self.centroids.shape, generator=generator, device="cpu")
        self.centroids.copy_(F.normalize(drawn, dim=-1))

    @torch.no_grad()
    def of(
        self, key: Float[Tensor, "batch key_heads length dim"], count: Int[Tensor, "batch 1"]
    ) -> Int[Tensor, "batch key_heads length"]:
        """The cluster of each key; `num_clusters` behind the `count` real ones."""
        nearest = (key.to(self.centroids.dtype) @ self.centroids.mT).argmax(dim=-1)
        position = torch.arange(key.shape[2], device=key.device)
        return nearest.masked_fill((position >= count).unsqueeze(1), self.num_clusters)

    def follow(
        self,
        out: Float[Tensor, "batch key_heads *rows"],
        key: Float[Tensor, "batch key_heads length dim"],
        cluster: Int[Tensor, "batch key_heads length"],
    ) -> None:
        """Let the centroids follow these keys when a gradient comes back through `out`."""
        if self.training and out.requires_grad:
            out.register_hook(lambda gradient: self._absorb(key.detach(), cluster))

    @torch.no_grad()
    def _absorb(self, key: Tensor, cluster: Tensor) -> None:
        heads, num_clusters, dim = self.centroids.shape
        unit = F.normalize(key.to(self.centroids.dtype), dim=-1)
        head = torch.arange(key.shape[1], device=key.device) % heads
        index = (head[:, None] * (num_clusters + 1) + cluster).flatten()
        total = unit.new_zeros(heads * (num_clusters + 1), dim)
        total.index_add_(0, index, unit.flatten(0, 2))
        number = total.new_zeros(len(total)).index_add_(
            0, index, torch.ones_like(unit[..., 0]).flatten()
        )
        total, number = (x.unflatten(0, (heads, -1))[:, :num_clusters] for x in (total, number))
        mean = total / number.clamp(min=1).unsqueeze(-1)
        moved = F.normalize(self.decay * self.centroids + (1 - self.decay) * mean, dim=-1)
        self.centroids.copy_(torch.where(number.unsqueeze(-1) > 0, moved, self.centroids))
