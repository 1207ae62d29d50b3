"""The Linformer: keys and values projected along the length to a fixed number of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from performers.baselines.block_sparse import combined, part
from performers.baselines.drawn import Drawn
from performers.baselines.tokens import check_bidirectional, real_tokens, rows_of_tokens
from performers.checks import check_choice, check_count, described

__all__ = ["LinformerAttention", "LinformerOptions"]

SHARING = ("none", "heads", "keys and values", "layers")


@dataclass(frozen=True)
class LinformerOptions:
    """`num_projections`: k, 600 in the experiments of Choromanski et al. (Appendix A.6).
    `sharing`: "none", where each key head has an E and an F of its own; "heads", one E and one F in
    a layer; "keys and values", one E = F in a layer; "layers", one E = F in all layers of a model.
    `is_learned`: whether they are weights; otherwise they stay as drawn, until `redraw_features`
    draws them anew.
    """

    num_projections: int = 600
    sharing: str = "none"
    is_learned: bool = True

    def __post_init__(self) -> None:
        check_count("num_projections", self.num_projections)
        check_choice("sharing", self.sharing, SHARING)
        if not isinstance(self.is_learned, bool):
            raise TypeError(f"is_learned must be true or false, got {described(self.is_learned)}.")


class LinformerAttention(Drawn):
    """Softmax attention over k linear combinations of the keys.

        out_i = softmax(q_i (E K)ᵀ / √dim) (F V),    E, F: k × length

    A sequence of n real tokens takes the first n columns of E and F. Entries begin as N(0, 1/k), of
    which the theorem behind the method is (Johnson and Lindenstrauss): E‖E x‖² = ‖x‖².

    It is bidirectional only: each row of E K is a sum over all positions, of which a query would
    have to leave out the later ones. It takes at most `max_length` positions. The weights of a row
    of the implied matrix sum to anything, because F has no reason to keep sums.

    Cost: O(length · k · dim); k · max_length numbers for each E and F.
    Source: Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", Eq. 7; Section 4,
    "Parameter sharing".

    Raises ValueError for a causal call, for a longer sequence, and for another number of key heads
    than it was made for.
    """

    of_keys: Tensor
    of_values: Tensor | None

    def __init__(
        self,
        options: LinformerOptions = LinformerOptions(),
        num_heads: int = 1,
        max_length: int = 4096,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        super().__init__(seed, layer, options.is_learned)
        self.options = options
        self.is_shared = options.sharing == "layers"
        heads = num_heads if options.sharing == "none" else 1
        self.own_tensor("of_keys", heads, options.num_projections, max_length)
        if options.sharing in ("keys and values", "layers"):
            self.of_values = None
        else:
            self.own_tensor("of_values", heads, options.num_projections, max_length)
        self.reset_parameters()

    def draw(self, generator: Generator) -> None:
        for matrix in (self.of_keys, self.of_values):
            if matrix is not None:
                drawn = torch.randn(matrix.shape, generator=generator, device="cpu")
                matrix.copy_(drawn / math.sqrt(self.options.num_projections))

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
        check_bidirectional(
            "the Linformer", is_causal, "it sums over all positions, later ones too"
        )
        slots = real_tokens(
            "the Linformer",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        length, max_length = key.shape[2], self.of_keys.shape[2]
        heads = self.of_keys.shape[0]
        if length > max_length:
            raise ValueError(
                f"the Linformer has projections for {max_length} positions, got {length}. Make it "
                "for longer sequences: in a model by max_position_embeddings."
            )
        if heads not in (1, key.shape[1]):
            raise ValueError(
                f"the Linformer has projections for {heads} key heads, got {key.shape[1]}. Make it "
                "for as many, or with sharing='heads'."
            )
        of_values = self.of_keys if self.of_values is None else self.of_values
        accurate = torch.promote_types(key.dtype, torch.float32)
        projected = (
            matrix[..., :length].to(accurate) @ x.to(accurate)
            for matrix, x in ((self.of_keys, slots.key), (of_values, slots.value))
        )
        key, value = (x.unsqueeze(2) for x in projected)
        # A sequence without real tokens has no row that is read, and no key of its own to hide.
        visible = torch.ones(1, 1, dtype=torch.bool, device=key.device)
        return rows_of_tokens(slots, combined([part(slots.query, key, value, visible)]))
