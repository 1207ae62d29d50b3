"""FAVOR+ within clusters: the two ways to make attention cheap, one inside the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.baselines.clusters import ClusterOptions, Clusters
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.functional import favor_attention
from performers.typing import FeatureMap

__all__ = ["ClusteredFavor", "ClusteredFavorOptions"]


@dataclass(frozen=True)
class ClusteredFavorOptions(ClusterOptions):
    """Those of `ClusterOptions`. `features`: a word for features, as after "performer-"."""

    features: str = "positive"


class ClusteredFavor(nn.Module):
    """FAVOR+ among the positions of one k-means cluster, however many they are.

        out_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j)    over j with μ(j) = μ(i),  causal: j ≤ i

    The key of a position decides on its cluster (`Clusters`). Unlike chunks of exact attention,
    features reach every member of a cluster. One cluster is FAVOR+ itself. No cross-attention.

    Cost: that of FAVOR+ for every cluster, O(num_clusters · length · num_features · dim), because
    each is a mask over the whole sequence.
    Source: Choromanski et al. 2021, Section 1, which names clusters as a technique to combine
    FAVOR+ with; clusters of Roy et al. 2021.
    """

    def __init__(
        self,
        feature_map: nn.Module,
        options: ClusteredFavorOptions = ClusteredFavorOptions(),
        dim: int = 64,
        num_heads: int = 1,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.clusters = Clusters(options, dim, num_heads, seed, layer)

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """Shapes and masks as in `favor_attention`, with one query per key."""
        assert isinstance(self.feature_map, FeatureMap)
        slots = real_tokens(
            "clustered FAVOR+",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        cluster = self.clusters.of(slots.key, slots.count)
        # Clusters differ between heads, and masks only between sequences: each head is one.
        query = slots.query.flatten(0, 1)
        key, value = (x.flatten(0, 1).unsqueeze(1) for x in (slots.key, slots.value))
        members = cluster.flatten(0, 1)
        rows = torch.zeros_like(query[..., :1]).expand(-1, -1, -1, value.shape[-1])
        for number in range(self.clusters.num_clusters):
            is_member = members == number
            found = favor_attention(
                query, key, value, self.feature_map, is_causal, is_member, enable_gqa=True
            )
            rows = torch.where(is_member[:, None, :, None], found, rows)
        rows = rows.unflatten(0, slots.key.shape[:2])
        self.clusters.follow(rows, slots.key, cluster)
        return rows_of_tokens(slots, rows)
