"""`FavorCache`: what a converted model carries from one token to the next.

transformers passes the keys of new tokens to the cache, and what the cache returns to the attention
function. The attention function gets nothing else from the cache. So a memory returns the new keys
only, with a reference to itself on them:

    key ─► update() ─► key, which names its memory ─► favor() ─► memory.attend(): state ─► state
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from performers.convert.layer import FavorLayer
from performers.convert.options import FAVOR, FavorOptions
from performers.functional.masks import Seen
from performers.models.memory import LinearMemory
from performers.models.naming import CACHE
from performers.typing import FeatureMap

__all__ = [
    "CAUSAL_LAYERS",
    "PREPARE_CACHE",
    "FavorCache",
    "FavorMemory",
    "generate_in_constant_memory",
    "memory_of",
]

# Of models that generate: a method that puts a cache into the arguments of their calls.
PREPARE_CACHE = "_prepare_cache_for_generation"

# In a configuration, where layers were named by parts, which it does not have: the numbers of the
# converted layers that attend causally to their own sequence.
CAUSAL_LAYERS = "causal_layers"

# Kinds of memory that keep keys and values and nothing else.
KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


class FavorCache(Cache):
    """One memory per layer: a `LinearState` where FAVOR+ attends, whose size does not depend on the
    length; layers that stayed exact, or have heads that did, keep their keys and values.

    After `linearize`, `generate()` makes one by itself. Make one to continue a sequence over
    several calls, or for a model that was switched by attn_implementation="favor" alone:

        cache = FavorCache(model.config)
        turn = model.generate(prompt, past_key_values=cache)
        turn = model.generate(torch.cat([turn, more], dim=1), past_key_values=cache)

    With an encoder: `EncoderDecoderCache(FavorCache(model.config), DynamicCache())`.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        config = config.get_text_config(decoder=True)
        options = FavorOptions.of(config)
        kinds = getattr(config, "layer_types", None) or ()
        causal = (getattr(config, FAVOR, None) or {}).get(CAUSAL_LAYERS)
        layers = DynamicCache(config=config).layers
        for number, layer in enumerate(layers):
            converts = options.converts(number, kinds) if causal is None else number in causal
            has_state = converts and number not in options.exact_heads
            # Not isinstance: classes that derive from these keep more, or in another form.
            if type(layer) in KEYS_AND_VALUES and has_state:
                layers[number] = FavorMemory(number)
        super().__init__(layers=layers)


class FavorMemory(LinearMemory):
    """The memory of one converted layer: its state, and the φ that this state belongs to."""

    instead = (
        "Generate without an assistant, or keep all keys: "
        "generate(past_key_values=DynamicCache(config=model.config))."
    )

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.phi: FeatureMap | None = None
        self.is_waiting = False  # for attention to new keys

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """New keys and values as they came, for `attend`.

        Raises RuntimeError where earlier ones never got there, before their absence shows.
        """
        if self.is_waiting:
            raise RuntimeError(
                f"layer {self.number} of a FavorCache was given keys that attention did not get: "
                "the model does not attend by FAVOR+ there, or changes keys that the cache has "
                "returned, or was interrupted. Make a new FavorCache(model.config), or keep all "
                "keys: generate(past_key_values=DynamicCache(config=model.config))."
            )
        self.is_waiting = True
        self.lazy_initialization(key_states, value_states)
        self.num_tokens += key_states.shape[2]
        # A view, because an attribute on the caller's own tensor would outlive this call.
        key_states = key_states.view_as(key_states)
        key_states.favor_memory = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(
        self,
        layer: FavorLayer,
        query: Float[Tensor, "batch heads length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        seen: Seen,
        scale: float | None,
    ) -> Float[Tensor, "batch heads length value_dim"]:
        """Attention of the new positions over all so far."""
        out, self.state, self.phi = layer.resume(
            query,
            key,
            value,
            seen=seen,
            scale=scale,
            state=self.state,
            phi=self.phi,
        )
        self.is_waiting = False
        return out

    def reset(self) -> None:
        super().reset()
        self.phi = None
        self.is_waiting = False


def memory_of(key: Tensor) -> FavorMemory | None:
    """The memory that these keys come from, if they come from one."""
    memory: FavorMemory | None = getattr(key, "favor_memory", None)
    return memory


def generate_in_constant_memory(model: PreTrainedModel) -> None:
    """Let `model.generate` make a `FavorCache` where it makes a DynamicCache of its own accord.

    It does so in a private method of transformers. Where there is none, or one with other
    arguments, nothing changes: the model then keeps all keys and writes the same, only slower.
    """
    method = getattr(type(model), PREPARE_CACHE, None)
    known = ["self", "generation_config", "model_kwargs"]
    if method is not None and list(inspect.signature(method).parameters)[: len(known)] == known:
        # Not a bound method, which pickle would look for among the attributes of the model.
        setattr(model, PREPARE_CACHE, partial(_prepare_cache, model))


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
) -> None:
    is_given = model_kwargs.get(CACHE) is not None
    getattr(type(model), PREPARE_CACHE)(model, generation_config, model_kwargs, *args)
    made = model_kwargs.get(CACHE)
    if is_given or made is None:
        return
    # Not isinstance: a class that derives from DynamicCache was asked for, or keeps more.
    if isinstance(made, EncoderDecoderCache):
        # The keys of cross-attention are those of the input, whose number does not grow.
        if type(made.self_attention_cache) is DynamicCache:
            made.self_attention_cache = FavorCache(model.config)
    elif type(made) is DynamicCache:
        model_kwargs[CACHE] = FavorCache(model.config)
