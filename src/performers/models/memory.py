"""What one layer remembers between calls of `generate()`: a linear state, keys and values, or
nothing.

Each memory is a layer of a transformers `Cache` that knows how its mechanisms continue a sequence:
`attend` takes the queries, keys and values of the new positions alone.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from performers.typing import LinearState

__all__ = ["KeysAndValues", "State", "TokenCount"]

Output = Float[Tensor, "batch heads new_length value_dim"]


class TokenCount(CacheLayerMixin):
    """Memory of a mechanism in which no position sees another: the number of positions so far."""

    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

    def attend(
        self,
        mechanism: nn.Module,
        query: Float[Tensor, "batch heads new_length dim"],
        key: Float[Tensor, "batch key_heads new_length dim"],
        value: Float[Tensor, "batch key_heads new_length value_dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
    ) -> Output:
        """Attention of the new positions over all so far; the mask covers all of them."""
        self.num_tokens += key.shape[2]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[:, -key.shape[2] :]
        return self._attend(mechanism, query, key, value, key_padding_mask)

    def _attend(
        self, mechanism: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return mechanism(query, key, value, is_causal=True, key_padding_mask=mask)

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1  # transformers' word for "no limit"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True  # nothing is allocated ahead

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise TypeError(
            f"{type(self).__name__} keeps no keys and values to return: use it with the "
            "Performer models, which call `attend`."
        )

    def reset(self) -> None:
        self.num_tokens = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; `tokens_to_remove` is negative, as everywhere in transformers."""
        self.num_tokens += tokens_to_remove

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None: ...

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def offload(self) -> None: ...

    def prefetch(self) -> None: ...


class State(TokenCount):
    """Memory of linear attention: one `LinearState`, of the same size at every length."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.state: LinearState | None = None

    def _attend(
        self, mechanism: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        out, self.state = mechanism(
            query,
            key,
            value,
            is_causal=True,
            key_padding_mask=mask,
            initial_state=self.state,
            return_state=True,
        )
        return out

    def reset(self) -> None:
        super().reset()
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(CANNOT_FORGET)

    def activate_past_recording(self) -> None:
        """Called before tokens are tried out that may have to be taken back."""
        raise NotImplementedError(CANNOT_FORGET)

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        if self.state is not None:
            self.state = self.state.index_select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats)


CANNOT_FORGET = (
    "a linear state sums over all tokens seen and cannot give the last ones back, so assisted and "
    "prompt-lookup decoding and Cache.crop are not available. Generate without an assistant, or "
    "use a model with attention='exact'."
)


class KeysAndValues(DynamicLayer):
    """Memory of exact attention: all keys and values, which grow with the length."""

    def attend(
        self,
        mechanism: nn.Module,
        query: Float[Tensor, "batch heads new_length dim"],
        key: Float[Tensor, "batch key_heads new_length dim"],
        value: Float[Tensor, "batch key_heads new_length value_dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
    ) -> Output:
        """Attention of the new positions over all so far; the mask covers all of them."""
        keys, values = self.update(key, value)
        past_length = keys.shape[2] - key.shape[2]
        if key.shape[2] == 1:  # the last position sees every key, so no causal mask is needed
            return mechanism(query, keys, values, key_padding_mask=key_padding_mask)
        # Causal attention takes one query per key: rows of the past are computed and dropped.
        queries = F.pad(query, (0, 0, past_length, 0))
        out = mechanism(queries, keys, values, is_causal=True, key_padding_mask=key_padding_mask)
        return out[:, :, past_length:]
