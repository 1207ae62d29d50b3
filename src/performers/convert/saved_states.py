"""States in files: a text is read once, and generation continues from there in another process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.cache_utils import Cache

from performers.checks import check_instance
from performers.convert.cache import FavorCache
from performers.convert.source import read_tensors
from performers.models.cache import PerformerCache
from performers.models.memory import LinearMemory
from performers.models.modeling import PerformerPreTrainedModel
from performers.records import holding
from performers.state import LinearState, Maker, NearKeys

__all__ = ["linear_memories", "load_state", "new_cache", "save_state"]

# The entry of a file that says what its tensors are of.
METADATA = "performers"
REMEDY = "Give a file that save_state wrote."


def new_cache(model: Any) -> Cache:
    """The cache of a causal Performer or converted model, before the first token."""
    own = isinstance(model, PerformerPreTrainedModel)
    return PerformerCache(model.config) if own else FavorCache(model.config)


def linear_memories(cache: Cache) -> list[LinearMemory]:
    """What each layer remembers.

    Raises ValueError for a layer that keeps something else than a state.
    """
    for number, memory in enumerate(cache.layers):
        if not isinstance(memory, LinearMemory):
            raise ValueError(
                f"layer {number} keeps a {type(memory).__name__} in its cache, and every layer "
                "must have a LinearState: take a causal Performer, or a model that linearize has "
                "converted in all layers, without exact heads."
            )
    return list(cache.layers)


def save_state(cache: Cache, path: str | Path) -> None:
    """Write what a model has read to a safetensors file, for `load_state`.

    `cache`: a `PerformerCache` or `FavorCache` that a model has filled, by a call with
    past_key_values=cache. The size of the file does not depend on how much was read.

    Raises ValueError for caches with other layers, or that have seen no token.

    >>> import tempfile, torch
    >>> from performers import PerformerConfig, PerformerForCausalLM, load_state, save_state
    >>> from performers.models import PerformerCache
    >>> sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = PerformerForCausalLM(PerformerConfig(vocab_size=50, **sizes)).eval()
    >>> book, more = torch.randint(50, (1, 40)), torch.randint(50, (1, 3))
    >>> cache = PerformerCache(model.config)
    >>> _ = model(book, past_key_values=cache)
    >>> path = tempfile.mkdtemp() + "/book.safetensors"
    >>> save_state(cache, path)
    >>> model(more, past_key_values=load_state(model, path)).logits.shape
    torch.Size([1, 3, 50])
    """
    check_instance("cache", cache, Cache, "a PerformerCache or a FavorCache")
    tensors, layers = {}, []
    for number, memory in enumerate(linear_memories(cache)):
        if memory.state is None:
            raise ValueError(
                f"layer {number} of the cache has seen no token: call the model with "
                "past_key_values=cache first."
            )
        for name, part in memory.state.parts().items():
            tensors[f"{number}.{name}"] = part.detach().clone().contiguous()
        made_by = memory.state.made_by
        made = None if made_by is None else [made_by.features, made_by.scale]
        layers.append({"num_tokens": memory.num_tokens, "made_by": made})
    save_file(tensors, path, metadata={METADATA: json.dumps(layers)})


def load_state(model: nn.Module, path: str | Path) -> Cache:
    """The cache that `save_state` wrote, for this model, on its device.

    Pass it as past_key_values to the model, or to `generate` with the ids of the whole text. Each
    call changes it: load it again to begin from the same place.

    Raises ValueError for a file that is damaged or of a model with other layers; the first call
    does so where its features are others.
    """
    check_instance("model", model, nn.Module, "a causal Performer or a converted model")
    path = Path(path)
    tensors = read_tensors(path, REMEDY)
    cache = new_cache(model)
    memories = linear_memories(cache)
    device = next(model.parameters()).device
    with holding(path, "the states of a model", REMEDY):
        with safe_open(path, framework="pt") as file:
            layers = json.loads(file.metadata()[METADATA])
        if len(layers) != len(memories):
            raise ValueError(
                f"it has the states of {len(layers)} layers, and {type(model).__name__} has "
                f"{len(memories)}"
            )
        for number, (memory, written) in enumerate(zip(memories, layers, strict=True)):
            prefix = f"{number}."
            parts = {
                name.removeprefix(prefix): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            memory.num_tokens = int(written["num_tokens"])
            memory.state = _state(parts, written["made_by"])
    return cache


def _state(parts: dict[str, Any], made_by: list[Any] | None) -> LinearState:
    """The way back from `LinearState.parts`."""
    sums = ("log_scale", "normalizer", "values")
    near = {name.removeprefix("near."): x for name, x in parts.items() if name not in sums}
    keys = NearKeys(**near) if near else None
    maker = None if made_by is None else Maker(_as_tuples(made_by[0]), made_by[1])
    state = LinearState(*(parts[name] for name in sums))
    return replace(state, near=keys, made_by=maker)


def _as_tuples(tree: Any) -> Any:
    """JSON knows lists only, and features are told apart by tuples."""
    return tuple(map(_as_tuples, tree)) if isinstance(tree, list) else tree
