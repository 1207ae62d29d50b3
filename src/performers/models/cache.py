"""`PerformerCache`: what `generate()` carries from one token to the next."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers.cache_utils import Cache

from performers.models.config import PerformerConfig
from performers.models.mixes import build_memory

__all__ = ["PerformerCache", "no_continuous_batching"]


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


def no_continuous_batching(*args: Any, **options: Any) -> NoReturn:
    """In the place of `init_continuous_batching`, which `generate_batch` begins with: a thread of
    its own would report what the attention layers say to nobody.
    """
    raise NotImplementedError(
        "generate_batch keeps keys and values in pages, and linear attention keeps a sum in their "
        "place, so continuous batching is not possible. Generate from a padded batch: "
        "generate(input_ids, attention_mask=...)."
    )
