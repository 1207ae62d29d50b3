"""Which mechanism attends where: one for all, one per layer, or several side by side in a layer.

    attention="performer-relu"                              every head of every layer
    attention={"local": 2, "performer-relu": 6}             in every layer two heads and six
    attention=["performer-relu", {"local": 2, "exact": 6}]  an entry for each layer

Each place is described by a config of its own, of one mechanism and as many heads as it has there.
So rows of `MECHANISMS` know nothing of mixes.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from performers.baselines import Drawn
from performers.checks import check_choice, check_count
from performers.models.fields import PerformerFields
from performers.models.mechanisms import (
    MECHANISMS,
    causal_memory,
    check_dialect,
    has_epsilon_features,
    only_mechanism,
    own_options,
)
from performers.models.memory import Nothing, Rerun, SideBySide, State
from performers.nn.mechanisms import HeadGroups

__all__ = [
    "attention_words",
    "build_attention",
    "build_memory",
    "check_attention",
    "share_between_layers",
]

Entry = str | dict[str, int]


def build_attention(config: PerformerFields, layer: int) -> nn.Module:
    """The mechanism of this layer, or the several of its groups of heads."""
    places = _places(config, layer)
    built = {
        (name := only_mechanism(place)): MECHANISMS[name].build(place, layer) for place in places
    }
    if len(places) == 1:
        return built[only_mechanism(places[0])]
    heads = {
        only_mechanism(p): (p.num_attention_heads, p.num_key_value_heads or p.num_attention_heads)
        for p in places
    }
    return HeadGroups(built, heads)


def share_between_layers(layers: nn.ModuleList) -> None:
    """Let layers whose mechanism says `is_shared` have that of the first of them."""
    shared: dict[type[nn.Module], nn.Module] = {}
    for path, module in list(layers.named_modules()):
        if isinstance(module, Drawn) and module.is_shared:
            layers.set_submodule(path, shared.setdefault(type(module), module))
    own = {name for name, _ in [*layers.named_parameters(), *layers.named_buffers()]}
    # transformers saves a tensor of several names once if it is told which of them are copies.
    copies = {name: name for name in layers.state_dict() if name not in own}
    layers._tied_weights_keys = copies  # type: ignore[assignment]


def build_memory(config: PerformerFields, layer: int) -> Nothing | Rerun | SideBySide | State:
    """What this layer of a causal model remembers, before the first token. Raises ValueError where
    `causal_memory` does.
    """
    memories = [causal_memory(place)() for place in _places(config, layer)]
    return memories[0] if len(memories) == 1 else SideBySide(memories)


def attention_words(attention: str | dict[str, int] | list[Entry]) -> str:
    """A mix as one word for tables: "exact, 2 local + 6 performer-relu"."""
    if isinstance(attention, str):
        return attention
    if isinstance(attention, list):
        return ", ".join(attention_words(entry) for entry in attention)
    return " + ".join(f"{count} {name}" for name, count in sorted(attention.items()))


def check_attention(config: PerformerFields) -> None:
    """Raise ValueError or TypeError for the first thing about attention that does not fit."""
    for entry in _entries(config):
        _check_entry(config, entry)
    _check_options(config)
    places = {
        (only_mechanism(place), place.num_attention_heads): place
        for layer in range(len(_entries(config)))
        for place in _places(config, layer)
    }
    for place in places.values():
        own_options(place)  # refuses what the mechanism does not have
        MECHANISMS[only_mechanism(place)].check(place)
        if config.dialect is not None:
            check_dialect(place)
        if config.is_decoder and (config.use_cache or not has_epsilon_features(config)):
            causal_memory(place)  # refuses what has none
    if config.window_size is not None:
        check_count("window_size", config.window_size)
        if all(place.window_size is None for place in places.values()):
            windowed = sorted(name for name, row in MECHANISMS.items() if row.takes_window)
            raise ValueError(
                "window_size puts exact softmax scores beside estimated ones: it needs attention "
                f"in {windowed}, got attention={config.attention!r}."
            )


def _entries(config: PerformerFields) -> list[Entry]:
    """What `attention` says of each layer; one entry where it says the same of all."""
    attention = config.attention
    if not isinstance(attention, list):
        return [attention]
    if len(attention) != config.num_hidden_layers:
        raise ValueError(
            "a list in attention must have one entry per layer: got "
            f"{len(attention)} for num_hidden_layers={config.num_hidden_layers}."
        )
    return attention


def _places(config: PerformerFields, layer: int) -> list[PerformerFields]:
    """Of each group of heads of a layer a config of one mechanism, in the order of the heads.

    It is that of the names, not of the mapping: a config that is saved has its keys sorted.
    """
    entry = config.attention[layer] if isinstance(config.attention, list) else config.attention
    if isinstance(config.attention, str):
        groups = [(config.attention, config.num_attention_heads, config.attention_options)]
    else:
        entry = {entry: config.num_attention_heads} if isinstance(entry, str) else entry
        options = config.attention_options or {}
        groups = [(name, count, options.get(name)) for name, count in sorted(entry.items())]
    return [_place(config, *group) for group in groups]


def _place(
    config: PerformerFields, name: str, heads: int, options: dict[str, Any] | None
) -> PerformerFields:
    assert config.num_key_value_heads is not None, "a config has chosen it"
    place = copy.copy(config)
    place.num_key_value_heads = heads * config.num_key_value_heads // config.num_attention_heads
    place.num_attention_heads = heads
    place.attention, place.attention_options = name, options
    if not MECHANISMS[name].takes_window:
        place.window_size = None
    return place


def _check_entry(config: PerformerFields, entry: object) -> None:
    if not isinstance(entry, dict):
        check_choice("attention", entry, MECHANISMS)
        return
    for name, heads in entry.items():
        check_choice("attention", name, MECHANISMS)
        check_count(f"the number of heads of {name!r} in attention", heads)
    assert config.num_key_value_heads is not None, "a config has chosen it"
    if sum(entry.values()) != config.num_attention_heads:
        raise ValueError(
            "the heads of a mapping in attention must be all of the layer: got "
            f"{entry} for num_attention_heads={config.num_attention_heads}."
        )
    group = config.num_attention_heads // config.num_key_value_heads
    if any(heads % group for heads in entry.values()):
        raise ValueError(
            f"heads that share a key head must attend by one mechanism: here {group} do, so each "
            f"number of heads in attention must be a multiple of {group}, got {entry}."
        )


def _check_options(config: PerformerFields) -> None:
    options = config.attention_options
    if not isinstance(options, dict | None):
        raise TypeError(
            f"attention_options must be a mapping of options to values, got {options!r}."
        )
    if isinstance(config.attention, str):
        return
    mixed = {name for entry in _entries(config) for name in _names(entry)}
    for name, own in (options or {}).items():
        if name not in mixed or not isinstance(own, dict | None):
            raise ValueError(
                "attention_options of a mix must be a mapping of its mechanisms to their options, "
                f'such as {{"local": {{"window_size": 64}}}}, got {name!r}: {own!r} beside '
                f"attention={config.attention!r}."
            )


def _names(entry: Entry) -> list[str]:
    return [entry] if isinstance(entry, str) else list(entry)
