"""The Routing Transformer: each position sees those of its own cluster."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.baselines.block_sparse import real, rows_at, sees_all
from performers.baselines.clusters import ClusterOptions, Clusters
from performers.baselines.groups import attend_to_blocks_of_places, group_by_group
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_count

__all__ = ["RoutingAttention", "RoutingOptions"]


@dataclass(frozen=True)
class RoutingOptions(ClusterOptions):
    """Those of `ClusterOptions`. `chunk_size`: how many positions of its cluster a position sees
    on each side of its chunk.
    """

    chunk_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk_size", self.chunk_size)


class RoutingAttention(nn.Module):
    """Softmax attention among the positions of one k-means cluster.

        out_i = Σ_j softmax_j(q_i·k_j/√dim) v_j    over j with μ(j) = μ(i),  causal: and j ≤ i

        positions    0 1 2 3 4 5 6 7 8
        clusters     a b a b b a b a b
                     └───┴─────┴───┘      0, 2, 5, 7 see each other

    The key of a position decides on its cluster (`Clusters`). The members of a cluster are cut into
    chunks in their order; a query sees its own chunk and the ones beside it, causal the one before,
    so that a cluster which holds everything costs no more. The paper gives all clusters one size by
    taking the nearest keys of each, which for causal attention depends on later keys, and shares
    queries and keys where it is causal. A position always sees itself. No cross-attention.

    Cost: O(length · (num_clusters + chunk_size) · dim), and num_clusters · chunk_size² · dim.
    Source: Roy et al. 2021, "Efficient Content-Based Sparse Attention with Routing Transformers",
    Section 4.1.
    """

    def __init__(
        self,
        options: RoutingOptions = RoutingOptions(),
        dim: int = 64,
        num_heads: int = 1,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.options = options
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
        slots = real_tokens(
            "the Routing Transformer",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        cluster, size = self.clusters.of(slots.key, slots.count), self.options.chunk_size
        places, blocks = group_by_group(
            cluster, self.options.num_clusters + 1, size, before=1, after=0 if is_causal else 1
        )
        sees = real(slots, sees_all, is_causal)
        found = attend_to_blocks_of_places(
            slots.query, slots.key, slots.value, places.position, blocks, sees
        )
        rows = rows_at(found.average(), places.place.unsqueeze(2))
        self.clusters.follow(rows, slots.key, cluster)
        return rows_of_tokens(slots, rows)
