"""What a layer remembers while a sequence is generated: a linear state, all keys, or nothing.

Each memory is a layer of a transformers `Cache` that knows how its mechanisms continue a sequence:
`attend` takes the queries, keys and values of the new positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from performers.nn.dialect import DialectFavor
from performers.nn.mechanisms import Favor, HeadGroups
from performers.state import LinearState
from performers.typing import Attention

__all__ = [
    "EncodedKeys",
    "EncodedState",
    "KeysAndValues",
    "LinearMemory",
    "Memory",
    "Nothing",
    "QueriesAndValues",
    "Rerun",
    "SideBySide",
    "State",
]

Query = Float[Tensor, "batch heads new_length dim"]
Key = Float[Tensor, "batch key_heads new_length dim"]
Value = Float[Tensor, "batch key_heads new_length value_dim"]
Mask = Bool[Tensor, "batch length"]  # of all positions so far, the new ones last
Output = Float[Tensor, "batch heads new_length value_dim"]


class Memory(CacheLayerMixin):
    """A memory whose size does not depend on the length; it counts the positions it has seen."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = 0

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
        """Refused: there are no keys and values to return."""
        raise TypeError(
            f"{type(self).__name__} keeps no keys and values to return. It serves the Performer "
            "models, which call attend()."
        )

    def reset(self) -> None:
        self.num_tokens = 0
        self.is_initialized = False


class Nothing(Memory):
    """The memory of a mechanism in which no position sees another: none."""

    is_croppable = True

    def attend(
        self, mechanism: Attention, query: Query, key: Key, value: Value, mask: Mask | None
    ) -> Output:
        """Attention of the new positions over all so far."""
        self.num_tokens += key.shape[2]
        return mechanism(query, key, value, is_causal=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as everywhere in transformers."""
        self.num_tokens += tokens_to_remove

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None: ...

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...


class LinearMemory(Memory):
    """Memory of linear attention: one `LinearState`, None before the first key."""

    # What to do instead, where a state would have to forget.
    instead = "Generate without an assistant, or use a model with attention='exact'."

    def __init__(self) -> None:
        super().__init__()
        self.state: LinearState | None = None

    def reset(self) -> None:
        super().reset()
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise NotImplementedError(self._cannot_forget())

    def activate_past_recording(self) -> None:
        """Called before tokens are tried out that may have to be taken back."""
        raise NotImplementedError(self._cannot_forget())

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        if self.state is not None:
            self.state = self.state.index_select(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats)

    def _cannot_forget(self) -> str:
        return (
            "a linear state sums over all tokens seen and cannot give the last ones back: assisted "
            f"and prompt-lookup decoding and cropping the cache are not possible. {self.instead}"
        )


class State(LinearMemory):
    """Memory of FAVOR+."""

    def attend(
        self,
        mechanism: Favor | DialectFavor,
        query: Query,
        key: Key,
        value: Value,
        mask: Mask | None,
    ) -> Output:
        """Attention of the new positions over all so far."""
        new_length = key.shape[2]
        if mask is not None:
            # The mask covers the past too, which is in the state already.
            mask = mask[:, mask.shape[1] - new_length :]
        self.num_tokens += new_length
        out, self.state = mechanism.resume(query, key, value, mask, self.state)
        return out


class EncodedState(LinearMemory):
    """What cross-attention by FAVOR+ remembers of an encoder: one `LinearState`, made once."""

    def remember(self, mechanism: Favor, key: Key, value: Value, mask: Mask | None) -> None:
        """Take in the whole output of the encoder."""
        self.num_tokens = key.shape[2]
        self.state = mechanism.remember(key, value, mask)

    def recall(self, mechanism: Favor, query: Query) -> Output:
        """Attention of new positions of the decoder, at a cost that no length has a part in."""
        assert self.state is not None, "the encoder's output comes first"
        return mechanism.recall(query, self.state)


class EncodedKeys(DynamicLayer):
    """What exact cross-attention remembers of an encoder: all of its keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Mask | None = None

    def remember(self, mechanism: Attention, key: Key, value: Value, mask: Mask | None) -> None:
        """Take in the whole output of the encoder."""
        self.update(key, value)
        self.mask = mask

    def recall(self, mechanism: Attention, query: Query) -> Output:
        """Attention of new positions of the decoder."""
        assert self.keys is not None, "the encoder's output comes first"
        assert self.values is not None, "the encoder's output comes first"
        return mechanism(query, self.keys, self.values, key_padding_mask=self.mask)

    def reset(self) -> None:
        # Not the zeros of `DynamicLayer.reset`, to which the next encoder's keys would be appended.
        self.keys = self.values = self.mask = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        super().reorder_cache(beam_idx)
        self._map_mask(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        super().batch_select_indices(indices)
        self._map_mask(lambda mask: mask[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_mask(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def _map_mask(self, change: Callable[[Tensor], Tensor]) -> None:
        self.mask = None if self.mask is None else change(self.mask)


class Rerun(DynamicLayer):
    """Memory of a mechanism that knows positions: all keys and values, which grow with the length.

    The mechanism runs over the whole sequence for each step, which costs as much as it does there.
    """

    def attend(
        self, mechanism: Attention, query: Query, key: Key, value: Value, mask: Mask | None
    ) -> Output:
        """Attention of the new positions over all so far."""
        keys, values = self.update(key, value)
        past_length = keys.shape[2] - key.shape[2]
        # Causal attention takes one query per key, so new positions need queries for the past as
        # well; their outputs are dropped.
        queries = F.pad(query, (0, 0, past_length, 0))
        out = mechanism(queries, keys, values, is_causal=True, key_padding_mask=mask)
        return out[:, :, past_length:]


class QueriesAndValues(Rerun):
    """Memory of a mechanism whose queries are its keys: queries and values."""

    def attend(
        self, mechanism: Attention, query: Query, key: Key, value: Value, mask: Mask | None
    ) -> Output:
        """Attention of the new positions over all so far."""
        queries, values = self.update(query, value)
        keys = queries[:, :: query.shape[1] // key.shape[1]]  # not read
        out = mechanism(queries, keys, values, is_causal=True, key_padding_mask=mask)
        return out[:, :, queries.shape[2] - query.shape[2] :]


class KeysAndValues(Rerun):
    """Memory of exact attention: all keys and values, which grow with the length."""

    def attend(
        self, mechanism: Attention, query: Query, key: Key, value: Value, mask: Mask | None
    ) -> Output:
        """Attention of the new positions over all so far."""
        if key.shape[2] > 1:
            return super().attend(mechanism, query, key, value, mask)
        keys, values = self.update(key, value)  # the last position sees every key
        return mechanism(query, keys, values, key_padding_mask=mask)


class SideBySide(Memory):
    """Memory of several mechanisms in the heads of one layer: one of each."""

    def __init__(self, memories: Sequence[Nothing | Rerun | State]) -> None:
        super().__init__()
        self.memories = memories
        self.is_croppable = all(memory.is_croppable for memory in memories)

    def attend(
        self, mechanism: HeadGroups, query: Query, key: Key, value: Value, mask: Mask | None
    ) -> Output:
        """Attention of the new positions over all so far."""
        self.num_tokens += key.shape[2]
        groups = mechanism.groups(query, key, value)
        outs = [
            memory.attend(*group, mask) for memory, group in zip(self.memories, groups, strict=True)
        ]
        return torch.cat(outs, dim=1)

    def reset(self) -> None:
        super().reset()
        for memory in self.memories:
            memory.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as everywhere in transformers."""
        for memory in self.memories:
            memory.crop(tokens_to_remove)
        self.num_tokens += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Called before tokens are tried out that may have to be taken back."""
        for memory in self.memories:
            if isinstance(memory, State):
                memory.activate_past_recording()

    def reorder_cache(self, beam_idx: Int[Tensor, " beams"]) -> None:
        for memory in self.memories:
            memory.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        for memory in self.memories:
            memory.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for memory in self.memories:
            memory.batch_repeat_interleave(repeats)
