"""Attention mechanisms as modules: (Q, K, V) to an output (`performers.typing.Attention`)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.functional import favor_attention, softmax_attention
from performers.nn.feature_maps import KernelFeatures, SoftmaxFeatures
from performers.nn.sharp import SharpFeatures
from performers.state import LinearState

__all__ = ["Exact", "Favor"]

Output = Float[Tensor, "batch heads query_length value_dim"]


class Favor(nn.Module):
    """`favor_attention` with its own feature map, and with a near field if given a window.

    `attend` is what computes it: another function of the same arguments may take its place, as over
    the pieces of a sequence that is split (`performers.distributed`).
    """

    def __init__(
        self,
        feature_map: SoftmaxFeatures | SharpFeatures | KernelFeatures,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.window_size = window_size
        self.attend: Callable[..., Tensor] = favor_attention

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
