"""The Reformer: each position sees those that a locality-sensitive hash puts beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from performers.baselines.block_sparse import real, rows_at
from performers.baselines.drawn import Drawn
from performers.baselines.groups import (
    Blocks,
    Places,
    attend_to_blocks_of_places,
    end_to_end,
    group_by_group,
)
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_count

__all__ = ["ReformerAttention", "ReformerOptions"]


@dataclass(frozen=True)
class ReformerOptions:
    """`num_hashes`: rounds, each with a hash of its own. `num_buckets`: values of a hash, an even
    number. `chunk_size`: positions of a chunk; the paper has length / num_buckets · 2.
    """

    num_hashes: int = 4
    num_buckets: int = 64
    chunk_size: int = 64

    def __post_init__(self) -> None:
        check_count("num_hashes", self.num_hashes)
        check_count("num_buckets", self.num_buckets, least=2)
        check_count("chunk_size", self.chunk_size)
        if self.num_buckets % 2:
            raise ValueError(
                "num_buckets must be even, because a hash is the largest of the coordinates and "
                f"their negatives: got {self.num_buckets}."
            )


class ReformerAttention(Drawn):
    """Softmax attention among positions whose hashes agree: LSH attention.

        h(x)  = argmax [x R; −x R],           R: dim × num_buckets / 2, Gaussian, for each round
        out_i = Σ_j softmax_j(q_i·k_j) v_j,   k_j = q_j / ‖q_j‖,  over the j near i in any round

        positions   sorted by (hash, position)   cut into chunks; a chunk sees itself and the one
        0 1 2 3 …   a a a b b b b c c d d d d    before, the first one the last of another round
                    ─────┤─────┤─────┤──────

    Queries are their own keys, as the paper has it: `key` is not read, and a model has no use for
    its projection of keys. Since a position is nearest to itself, it sees itself only if it sees
    nothing else. Rounds are merged under one normalizer; a pair that meets in two rounds counts
    twice, as in the published models.

    Causal attention must not cut the sorted sequence into chunks: the place of a cut depends on
    later positions. Here each bucket begins a chunk, and a chunk sees itself and the one before of
    the same bucket, up to the query. In the published models the past changes with the future.

    It has no cross-attention. A constant number of buckets makes chunks of one bucket longer with
    the length, so that long sequences need more of them.

    Cost: O(num_hashes · length · (log length + chunk_size · dim)); causal, num_hashes · num_buckets
    · chunk_size² · dim more.
    Source: Kitaev et al. 2020, "Reformer: The Efficient Transformer", Section 2; Choromanski et al.
    2021, Appendix A.5.
    """

    rotations: Tensor

    def __init__(
        self,
        options: ReformerOptions = ReformerOptions(),
        dim: int = 64,
        num_heads: int = 1,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """`num_heads`: query heads with hashes of their own; 1 for hashes that all share."""
        super().__init__(seed, layer)
        self.options = options
        self.own_tensor("rotations", num_heads, options.num_hashes, dim, options.num_buckets // 2)
        self.reset_parameters()

    def draw(self, generator: Generator) -> None:
        self.rotations.copy_(torch.randn(self.rotations.shape, generator=generator, device="cpu"))

    @torch.no_grad()
    def buckets(
        self, query: Float[Tensor, "batch heads length dim"]
    ) -> Int[Tensor, "batch heads num_hashes length"]:
        """h of each query in each round."""
        rotated = query.unsqueeze(2) @ self.rotations.to(query.dtype)
        largest = rotated.abs().argmax(dim=-1, keepdim=True)
        is_negative = rotated.gather(-1, largest) < 0
        return (largest + self.options.num_buckets // 2 * is_negative).squeeze(-1)

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """Shapes and masks as in `favor_attention`, with one query per key. `key` is not read."""
        shared = query[:, :: query.shape[1] // key.shape[1]]
        slots = real_tokens(
            "the Reformer",
            query, shared, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        heads, key_heads = query.shape[1], key.shape[1]
        accurate = torch.promote_types(value.dtype, torch.float32)
        query = slots.query.flatten(1, 2).to(accurate)
        value = slots.value.repeat_interleave(heads // key_heads, dim=1).to(accurate)
        unit = F.normalize(query, dim=-1) * math.sqrt(query.shape[-1])  # scores are over √dim
        position = torch.arange(query.shape[2], device=query.device)
        is_padding = (position >= slots.count)[:, None, None]
        # Padding has a bucket of its own, the last.
        bucket = self.buckets(query).masked_fill(is_padding, self.options.num_buckets)
        places, blocks = self._blocks(bucket, slots.count, is_causal)
        sees = real(slots, lambda sequence, head, i, j: j != i, is_causal)
        in_places = attend_to_blocks_of_places(
            query.unsqueeze(2), unit, value, places.position.flatten(2), blocks, sees
        )
        in_rounds = in_places.map(
            lambda x: rows_at(
                x.squeeze(2).unflatten(2, (self.options.num_hashes, -1)), places.place
            )
        )
        whole = in_rounds.merged(2)
        rows = torch.where(whole.total == 0, value, whole.average())
        return rows_of_tokens(slots, rows.unflatten(1, (key_heads, -1)))

    def _blocks(
        self,
        bucket: Int[Tensor, "batch heads num_hashes length"],
        count: Int[Tensor, "batch 1"],
        is_causal: bool,
    ) -> tuple[Places, Blocks]:
        """The places of each round, and the blocks of all rounds: those of causal attention are of
        the chunk of a block and the one before, else chunks themselves.
        """
        size, num_hashes = self.options.chunk_size, self.options.num_hashes
        if is_causal:
            places, (size, near) = group_by_group(
                bucket.flatten(1, 2), self.options.num_buckets + 1, size, before=1, after=0
            )
            near = near.unflatten(1, (-1, num_hashes))
            round_of = torch.arange(num_hashes, device=bucket.device)[:, None, None]
            near = torch.where(near < 0, near, near + round_of * near.shape[3]).flatten(2, 3)
        else:
            places = end_to_end(bucket.flatten(1, 2), size)
            per_round = places.position.shape[-1] // size
            own = torch.arange(num_hashes * per_round, device=bucket.device)
            last = (count - 1).clamp(min=0) // size  # the last chunk with a real token
            of_other_round = (own // max(per_round, 1) - 1) % num_hashes * per_round + last
            before = torch.where(own % max(per_round, 1) == 0, of_other_round, own - 1)
            near = torch.stack([before, own.expand_as(before)], dim=-1).unsqueeze(1)
        return Places(*(x.unflatten(1, (-1, num_hashes)) for x in places)), Blocks(size, near)
