"""The Synthesizer: attention weights that do not come from products of queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from performers.backends.slots import Slots
from performers.baselines.block_sparse import combined, part_of_scores, real_keys
from performers.baselines.drawn import Drawn
from performers.baselines.tokens import real_tokens, rows_of_tokens
from performers.checks import check_choice, check_count, described

__all__ = ["SynthesizerAttention", "SynthesizerOptions"]

KINDS = ("dense", "random", "factorized")


@dataclass(frozen=True)
class SynthesizerOptions:
    """`kind`: "dense", "random" or "factorized". `hidden_size`: of the perceptron of "dense".
    `rank`: k of "factorized". `is_learned`: of the random kinds, whether the scores are weights;
    otherwise they stay as drawn, until `redraw_features` draws them anew.
    """

    kind: str = "dense"
    hidden_size: int = 64
    rank: int = 8
    is_learned: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_count("hidden_size", self.hidden_size)
        check_count("rank", self.rank)
        if not isinstance(self.is_learned, bool):
            raise TypeError(f"is_learned must be true or false, got {described(self.is_learned)}.")
        if self.kind == "dense" and not self.is_learned:
            raise ValueError(
                "is_learned=False leaves scores as they were drawn, and those of kind='dense' are "
                "those of a perceptron. Take kind='random' or 'factorized'."
            )


class SynthesizerAttention(Drawn):
    """Softmax attention with scores that no key has a part in.

        out = softmax(S) V

        dense        S_i = relu(q_i W₁ + b₁) W₂ + b₂    a row of scores from the query alone
        random       S = R                              max_length × max_length numbers
        factorized   S = R₁ R₂ᵀ                         max_length × k numbers twice

    A sequence of n real tokens takes the first n rows and columns; causal attention the columns up
    to its row. In a model the query is a projection of the hidden state, which "dense" reads in the
    paper; the random kinds read neither. The matrix is that of all pairs, so that it is no cheaper
    than exact attention, and it takes at most `max_length` positions. The paper's factorized dense
    kind and its mixtures are left out.

    Cost: O(length² · dim).
    Source: Tay et al. 2020, "Synthesizer: Rethinking Self-Attention in Transformer Models",
    Section 3.

    Raises ValueError for a longer sequence, and for another number of heads than it was made for.
    """

    def __init__(
        self,
        options: SynthesizerOptions = SynthesizerOptions(),
        dim: int = 64,
        num_heads: int = 1,
        max_length: int = 4096,
        seed: int = 0,
        layer: int = 0,
    ) -> None:
        """`num_heads`: query heads with scores of their own; 1 for scores that all share."""
        super().__init__(seed, layer, options.is_learned)
        self.options = options
        self.max_length = max_length
        hidden = options.hidden_size
        shapes = {
            "dense": {
                "up": (dim, hidden),
                "up_bias": (1, hidden),
                "down": (hidden, max_length),
                "down_bias": (1, max_length),
            },
            "random": {"scores": (max_length, max_length)},
            "factorized": {"left": (max_length, options.rank), "right": (max_length, options.rank)},
        }[options.kind]
        for name, shape in shapes.items():
            self.own_tensor(name, num_heads, *shape)
        self.own = tuple(shapes)
        self.reset_parameters()

    def draw(self, generator: Generator) -> None:
        for name in self.own:
            tensor: Tensor = getattr(self, name)
            if name.endswith("bias"):
                tensor.zero_()
                continue
            # Scores of size 1: rows of a perceptron by the width that they sum over.
            width = {"scores": 1, "left": self.options.rank, "right": 1}
            fan_in = width.get(name, tensor.shape[1])
            drawn = torch.randn(tensor.shape, generator=generator, device="cpu")
            tensor.copy_(drawn / math.sqrt(fan_in))

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
            "the Synthesizer",
            query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        )  # fmt: skip
        length, heads = key.shape[2], getattr(self, self.own[0]).shape[0]
        if length > self.max_length:
            raise ValueError(
                f"the Synthesizer has scores for {self.max_length} positions, got {length}. Make "
                "it for longer sequences: in a model by max_position_embeddings."
            )
        if heads not in (1, query.shape[1]):
            raise ValueError(
                f"the Synthesizer has scores for {heads} heads, got {query.shape[1]}. Make it for "
                "as many, or for 1, whose scores all share."
            )
        position = torch.arange(length, device=key.device)
        visible = real_keys(slots)
        if is_causal:
            visible = visible & (position <= position[:, None])
        scores = self._scores(slots).expand(-1, -1, slots.query.shape[2], -1, -1)
        return rows_of_tokens(
            slots, combined([part_of_scores(scores, slots.value.unsqueeze(2), visible)])
        )

    def _scores(self, slots: Slots) -> Float[Tensor, "#batch #key_heads #group length length"]:
        length = slots.key.shape[2]
        accurate = torch.promote_types(slots.key.dtype, torch.float32)

        def grouped(name: str) -> Tensor:
            """[1 or key_heads, 1 or group, …] of one of the tensors."""
            tensor: Tensor = getattr(self, name).to(accurate)
            if len(tensor) == 1:
                return tensor.unsqueeze(0)
            return tensor.unflatten(0, (slots.key.shape[1], -1))

        if self.options.kind == "random":
            return grouped("scores")[None, ..., :length, :length]
        if self.options.kind == "factorized":
            left, right = (grouped(name)[None, ..., :length, :] for name in ("left", "right"))
            return left @ right.mT
        hidden = slots.query.to(accurate) @ grouped("up") + grouped("up_bias")
        return hidden.relu() @ grouped("down")[..., :length] + grouped("down_bias")[..., :length]
