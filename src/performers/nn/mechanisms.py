"""Attention mechanisms as modules: (Q, K, V) to an output (`performers.typing.Attention`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.functional import favor_attention, softmax_attention
from performers.nn.feature_maps import KernelFeatures, SoftmaxFeatures
from performers.nn.sharp import SharpFeatures
from performers.state import LinearState

__all__ = ["Exact", "Favor", "HeadGroups"]

Output = Float[Tensor, "batch heads query_length value_dim"]


class Favor(nn.Module):
    """`favor_attention` with its own feature map, and with a near field if given a window.

    `attend` is what computes it: another function of the same arguments may take its place, as over
    the pieces of a sequence that is split (`performers.distributed`).
    """

    attend: Callable[..., Tensor] = staticmethod(favor_attention)

    def __init__(
        self,
        feature_map: SoftmaxFeatures | SharpFeatures | KernelFeatures,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.window_size = window_size

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Output:
        """Arguments and result are those of `favor_attention`."""
        return self.attend(
            query,
            key,
            value,
            self.feature_map,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            enable_gqa=True,
            window_size=self.window_size,
        )

    def resume(
        self,
        query: Float[Tensor, "batch heads length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
        state: LinearState | None,
    ) -> tuple[Float[Tensor, "batch heads length value_dim"], LinearState]:
        """Causal attention of positions that continue a sequence, and the state after them."""
        return favor_attention(
            query,
            key,
            value,
            self.feature_map,
            is_causal=True,
            key_padding_mask=key_padding_mask,
            enable_gqa=True,
            window_size=self.window_size,
            initial_state=state,
            return_state=True,
        )

    def remember(
        self,
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        key_padding_mask: Bool[Tensor, "batch key_length"] | None,
    ) -> LinearState:
        """All that queries of another sequence can ask of these keys and values."""
        _, state = favor_attention(
            key[:, :, :0],
            key,
            value,
            self.feature_map,
            key_padding_mask=key_padding_mask,
            return_state=True,
        )
        return state

    def recall(
        self, query: Float[Tensor, "batch heads query_length dim"], state: LinearState
    ) -> Output:
        """Bidirectional attention to the keys of a state, whose number costs nothing any more."""
        batch, key_heads, _, value_dim = state.values.shape
        key = query.new_empty(batch, key_heads, 0, query.shape[-1])
        value = query.new_empty(batch, key_heads, 0, value_dim)
        return favor_attention(
            query, key, value, self.feature_map, enable_gqa=True, initial_state=state
        )


class Exact(nn.Module):
    """`softmax_attention`: the Transformer that a Performer is measured against."""

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Output:
        """Arguments and result are those of `softmax_attention`."""
        return softmax_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class HeadGroups(nn.Module):
    """Mechanisms side by side: the first group of heads attends by the first one, and so on.

        out = [attention₁(Q₁, K₁, V₁), attention₂(Q₂, K₂, V₂), …]    along the heads

    `heads`: of each mechanism how many heads of queries it has, and how many of keys.
    """

    def __init__(
        self, mechanisms: Mapping[str, nn.Module], heads: Mapping[str, tuple[int, int]]
    ) -> None:
        super().__init__()
        self.mechanisms = nn.ModuleDict(mechanisms)
        self.heads = [heads[name][0] for name in mechanisms]
        self.key_heads = [heads[name][1] for name in mechanisms]

    def groups(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
    ) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
        """Each mechanism with the heads that are its own."""
        yield from zip(
            self.mechanisms.values(),
            query.split(self.heads, dim=1),
            key.split(self.key_heads, dim=1),
            value.split(self.key_heads, dim=1),
            strict=True,
        )

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        """Shapes and masks as in `favor_attention`."""
        outs = [
            mechanism(*tensors, is_causal=is_causal, key_padding_mask=key_padding_mask)
            for mechanism, *tensors in self.groups(query, key, value)
        ]
        return torch.cat(outs, dim=1)
