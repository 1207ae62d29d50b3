"""Sparse Sinkhorn attention: each block sees itself, and one that a learned sorting puts there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor
from torch.nn import functional as F

from performers.baselines.block_sparse import combined, part
from performers.baselines.drawn import Drawn
from performers.baselines.tokens import check_bidirectional, real_tokens, rows_of_tokens
from performers.checks import check_count, check_number

__all__ = ["SinkhornAttention", "SinkhornOptions"]

# Of the blocks mixed in one place that have a position which others lack. To divide by less would
# not be a mixture of them, but of their rounding.
SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class SinkhornOptions:
    """`block_size`: positions of a block. `num_iterations`: of Sinkhorn's normalization.
    `temperature`: of the sorting; the smaller, the nearer to a permutation. `hidden_size`: of the
    sorting network.
    """

    block_size: int = 64
    num_iterations: int = 8
    temperature: float = 0.75
    hidden_size: int = 64

    def __post_init__(self) -> None:
        check_count("block_size", self.block_size)
        check_count("num_iterations", self.num_iterations, least=0)
        check_count("hidden_size", self.hidden_size)
        check_number("temperature", self.temperature)


class SinkhornAttention(Drawn):
    """Softmax attention over a query's own block and a mixture of blocks, sorted in its place.

        S   = relu(Ψ W₁) W₂,    Ψ_b = Σ_{j in block b} k_j       scores of blocks for each place
        R   = S / temperature, exp, rows and columns divided by their sums in turn; rows last
        K̃_b = Σ_c R_bc K_c,     Ṽ_b = Σ_c R_bc V_c               sorted blocks
        out = softmax over [K_b, K̃_b] of the values [V_b, Ṽ_b]   for the queries of block b

    R is a soft permutation, so that a few blocks far away can be seen at the cost of two. Where the
    last block is not full, its missing positions count in no mixture.

    It is bidirectional only: Sinkhorn's columns are sums over all blocks, later ones too. (The
    paper's causal form masks R, and its normalization still depends on later blocks.) The noise
    that the paper adds to scores while training is left out. It takes at most `max_length`
    positions. There is no cross-attention.

    Cost: with N = length / block_size, O(length · (block_size + N) · dim + N² · num_iterations).
    Source: Tay et al. 2020, "Sparse Sinkhorn Attention", Section 3.

    Raises ValueError for a causal call, for a longer sequence, and for another number of key heads
    than it was made for.
    """

    up: Tensor
    down: Tensor

    def __init__(
        self,
        options: SinkhornOptions = SinkhornOptions(),
        dim: int = 64,
        num_heads: int = 1,
        max_length: int = 4096,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """`num_heads`: key heads with a sorting of their own; 1 for one that all share."""
        super().__init__(seed, layer, is_learned=True)
        self.options = options
        self.max_length = max_length
        self.own_tensor("up", num_heads, dim, options.hidden_size)
        self.own_tensor(
            "down", num_heads, options.hidden_size, math.ceil(max_length / options.block_size)
        )
        self.reset_parameters()

    def draw(self, generator: Generator) -> None:
        for weight in (self.up, self.down):
            drawn = torch.randn(weight.shape, generator=generator, device="cpu")
            weight.copy_(drawn / math.sqrt(weight.shape[1]))

    def sorting(
        self,
        key: Float[Tensor, "batch key_heads num_blocks block_size dim"],
        has_tokens: Bool[Tensor, "#batch num_blocks"],
    ) -> Float[Tensor, "batch key_heads num_blocks num_blocks"]:
        """R: how much of each block is in each place, which takes nothing from an empty block."""
        accurate = torch.promote_types(key.dtype, torch.float32)
        of_block = key.to(accurate).sum(dim=3)
        scores = (of_block @ self.up.to(accurate)).relu() @ self.down.to(accurate)
        scores = scores[..., : key.shape[2]] / self.options.temperature
        # Below every score by far, but finite: −∞ has no gradient where a sequence has no tokens.
        nothing = torch.finfo(accurate).min / 4
        absent, absent_row = ~has_tokens[:, None, None, :], ~has_tokens[:, None, :, None]
        log = scores.masked_fill(absent, nothing).log_softmax(dim=-1)
        for _ in range(self.options.num_iterations):
            of_columns = log.masked_fill(absent_row, nothing).logsumexp(dim=-2, keepdim=True)
            log = (log - of_columns).masked_fill(absent, nothing).log_softmax(dim=-1)
        return log.exp()

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
        check_bidirectional("Sinkhorn attention", is_causal, "it sorts all blocks, later ones too")
        slots = real_tokens(
            "Sinkhorn attention",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        length, size = key.shape[2], self.options.block_size
        heads = self.up.shape[0]
        if length > self.max_length:
            raise ValueError(
                f"Sinkhorn attention sorts blocks of {self.max_length} positions, got {length}. "
                "Make it for longer sequences: in a model by max_position_embeddings."
            )
        if heads not in (1, key.shape[1]):
            raise ValueError(
                f"Sinkhorn attention sorts for {heads} key heads, got {key.shape[1]}. Make it for "
                "as many, or for 1, whose sorting all share."
            )
        if length == 0:
            return rows_of_tokens(slots, slots.value.unsqueeze(2).expand_as(slots.query))
        num_blocks = math.ceil(length / size)
        accurate = torch.promote_types(value.dtype, torch.float32)
        query, key, value = (
            F.pad(x, (0, 0, 0, num_blocks * size - length))
            .unflatten(-2, (num_blocks, size))
            .to(accurate)
            for x in (slots.query, slots.key, slots.value)
        )
        position = torch.arange(num_blocks * size, device=key.device).view(num_blocks, size)
        is_there = position < slots.count[:, :, None]  # [batch, num_blocks, block_size]
        sorting = self.sorting(key, is_there[..., 0])
        # A position that some of the mixed blocks lack is a mixture of the others.
        share = torch.einsum("bhij,bjs->bhis", sorting, is_there.to(accurate)).unsqueeze(-1)
        is_mixed = share > SMALLEST_SHARE
        mixed_key, mixed_value = (
            torch.einsum("bhij,bhjsd->bhisd", sorting, x) / torch.where(is_mixed, share, 1.0)
            for x in (key, value)
        )
        own = is_there[:, None, None, :, None]
        near = part(query, key.unsqueeze(2), value.unsqueeze(2), own)
        visible = is_mixed.unsqueeze(2).mT
        far = part(query, mixed_key.unsqueeze(2), mixed_value.unsqueeze(2), visible)
        rows = combined([near, far]).flatten(3, 4)[..., :length, :]
        return rows_of_tokens(slots, rows)
