"""`PerformerCache`: what `generate()` carries from one token to the next, and its like for models
with an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache

from performers.models.config import PerformerConfig, decoder_config
from performers.models.mechanisms import cross_memory
from performers.models.mixes import build_memory
from performers.models.naming import CACHE

__all__ = [
    "PerformerCache",
    "PerformerEncoderDecoderCache",
    "no_continuous_batching",
    "prepare_cache",
]


class PerformerCache(Cache):
    """One memory per layer: for FAVOR+ a `LinearState`, whose size does not depend on the length.

    `generate()` makes one by itself. Make one to continue a sequence over several calls:

        cache = PerformerCache(model.config)
        turn = model.generate(prompt, past_key_values=cache)
        turn = model.generate(torch.cat([turn, more], dim=1), past_key_values=cache)

    Raises ValueError for a mechanism that cannot be causal.
    """

    def __init__(self, config: PerformerConfig) -> None:
        layers = range(config.num_hidden_layers)
        super().__init__(layers=[build_memory(config, layer) for layer in layers])


class PerformerEncoderDecoderCache(EncoderDecoderCache):
    """The cache of an encoder-decoder: what its decoder has written, a `PerformerCache`, and what
    it will ask of the encoder, one memory per layer that is filled once.

    The cost of a token then depends on neither length, for FAVOR+ in both places.
    """

    self_attention_cache: Cache
    cross_attention_cache: Cache

    def __init__(self, config: PerformerConfig) -> None:
        memory = cross_memory(config)
        decoder = decoder_config(config)
        crossing = Cache(layers=[memory() for _ in range(decoder.num_hidden_layers)])
        super().__init__(PerformerCache(decoder), crossing)

    # transformers has these for caches of keys and values alone.

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens that were written; the encoder's output stays."""
        self.self_attention_cache.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch row `repeats` times in succession."""
        self.self_attention_cache.batch_repeat_interleave(repeats)
        self.cross_attention_cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Int[Tensor, " chosen"]) -> None:
        """The given batch rows."""
        self.self_attention_cache.batch_select_indices(indices)
        self.cross_attention_cache.batch_select_indices(indices)


def prepare_cache(
    generation_config: Any, model_kwargs: dict[str, Any], make: Callable[[], Cache]
) -> None:
    """Put the model's own cache into the arguments of `generate()`, where none is given.

    Raises ValueError for another kind of cache.
    """
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            "a Performer generates with a PerformerCache and no other: got "
            f"cache_implementation={generation_config.cache_implementation!r}. Leave it out."
        )
    if generation_config.use_cache and model_kwargs.get(CACHE) is None:
        model_kwargs[CACHE] = make()


def no_continuous_batching(*args: Any, **options: Any) -> NoReturn:
    """In the place of `init_continuous_batching`, which `generate_batch` begins with: a thread of
    its own would report what the attention layers say to nobody.
    """
    raise NotImplementedError(
        "generate_batch keeps keys and values in pages, and linear attention keeps a sum in their "
        "place, so continuous batching is not possible. Generate from a padded batch: "
        "generate(input_ids, attention_mask=...)."
    )
