"""Where a model of transformers attends: found by one walk over its modules, then passed along.

    sites = Sites.of(model)
    check_convertible(sites, options)
    sites.switch(FAVOR)

A site is a module that asks transformers' AttentionInterface for its attention, so that what it
gets can be replaced. Nothing else of a model is touched by a conversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from performers.convert.layer import FavorLayer
from performers.convert.options import FAVOR, FavorOptions
from performers.convert.plain_attention import (
    PAIRS_OF_ITS_OWN,
    asks_the_interface,
    attends_by_itself,
    other_attention_of_class,
    own_attention,
    reads_pairs,
    refusal,
    source_of,
)

__all__ = [
    "Site",
    "Sites",
    "check_convertible",
    "head_dim",
    "is_converted",
    "is_cross_attention",
    "layer_number",
]

# Arguments of an attention module that hold what another sequence consists of.
OTHER_KEYS = {"key_value_states", "encoder_hidden_states", "cross_attention_states"}


@dataclass(frozen=True)
class Site:
    """One attention module of a model, by its name there.

    `number`: that of its layer; modules that carry none are counted, in the order of the model.
    """

    name: str
    module: nn.Module
    number: int

    @property
    def device(self) -> torch.device:
        # Quantized layers keep packed weights, which are no tensors, and those exist on CPUs alone.
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def title(self) -> str:
        """Class and name, for errors."""
        return f"{type(self.module).__name__} ({self.name})"


@dataclass(frozen=True)
class Sites:
    """Where a model attends, in the order of the model.

    `attends_by_itself`: whether other modules compute attention and ask no interface for it.
    """

    model: PreTrainedModel
    found: tuple[Site, ...]
    attends_by_itself: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sites:
        """Find them. Cost: one walk over all modules; classes are read once in a process."""
        found: list[Site] = []
        uncounted = 0
        by_itself = False
        for name, module in model.named_modules():
            source = source_of(module)
            by_itself = by_itself or attends_by_itself(source)
            if asks_the_interface(source):
                number = layer_number(module)
                if number is None:
                    number, uncounted = uncounted, uncounted + 1
                found.append(Site(name, module, number))
        return cls(model, tuple(found), by_itself)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.found)

    @property
    def layers(self) -> dict[Site, FavorLayer]:
        """What attends in the place of the pretrained layers now, where they are converted."""
        layers = {site: getattr(site.module, FAVOR, None) for site in self.found}
        return {site: layer for site, layer in layers.items() if layer is not None}

    @property
    def configs(self) -> list[PreTrainedConfig]:
        """The model's configuration, then those of parts that its attention modules read."""
        configs: list[Any] = [self.model.config, *(site.module.config for site in self.found)]
        return list({id(config): config for config in configs}.values())

    def switch(self, implementation: str) -> None:
        """`set_attn_implementation`, for which a model that does not obey is an error."""
        self.model.set_attn_implementation(implementation)
        for site in self.found:
            config: Any = site.module.config
            if config._attn_implementation != implementation:
                raise ValueError(
                    f"{site.title} stayed with the attention implementation "
                    f"{config._attn_implementation!r}: transformers cannot switch this model."
                )


def check_convertible(sites: Sites, options: FavorOptions) -> None:
    """Raise if the model cannot be converted with these options, as far as shows without a call."""
    title = type(sites.model).__name__
    if not sites.found or sites.attends_by_itself:
        raise ValueError(own_attention(title))
    for site in sites:  # all of them: those that stay exact get no mask of pairs either
        if reads_pairs(source_of(site.module)):
            raise ValueError(refusal(site.title, PAIRS_OF_ITS_OWN))
    numbers = {site.number for site in sites}
    missing = set(options.layers or ()) - numbers
    if missing:
        raise ValueError(
            f"{title} has no layer {', '.join(map(str, sorted(missing)))}: its layers are 0 to "
            f"{max(numbers)}."
        )
    chosen = [site for site in sites if is_converted(site.module, options, site.number)]
    if not chosen:
        raise ValueError(f"layers={options.layers!r} leaves no layer of {title} to convert.")
    _check_heads(sites, options, {site.number: site.module for site in chosen})
    for site in chosen:
        kinds = other_attention_of_class(source_of(site.module))
        if kinds:
            raise ValueError(refusal(site.title, kinds[0]))


def _check_heads(sites: Sites, options: FavorOptions, chosen: dict[int, nn.Module]) -> None:
    """Refuse exact heads that are not heads of the layers chosen for conversion."""
    for layer, heads in options.exact_heads.items():
        if layer not in chosen:
            raise ValueError(
                f"exact_heads must be those of converted layers: layer {layer} of "
                f"{type(sites.model).__name__} is none of {', '.join(map(str, sorted(chosen)))}."
            )
        config: Any = chosen[layer].config
        num_heads = getattr(config, "num_attention_heads", None)
        if num_heads is not None and (heads[-1] >= num_heads or len(heads) == num_heads):
            raise ValueError(
                f"exact_heads must be some of the heads 0 to {num_heads - 1} of layer {layer}, got "
                f"{heads}. To keep all exact, leave the layer out of layers."
            )
    if options.exact_heads and any(layer_number(site.module) is None for site in sites):
        raise ValueError(
            f"exact_heads needs layers that carry a number, and some of "
            f"{type(sites.model).__name__} do not. Choose layers= instead."
        )


def layer_number(module: nn.Module) -> int | None:
    """The number that an attention module carries, if it carries one."""
    number: int | None = getattr(module, "layer_idx", None)
    return number


def is_converted(module: nn.Module, options: FavorOptions, number: int) -> bool:
    """Whether FAVOR+ takes the place of this module's attention."""
    has_number = layer_number(module) is not None
    kinds = getattr(module.config, "layer_types", None) if has_number else None
    return options.converts(number, kinds or ())


def is_cross_attention(module: nn.Module) -> bool:
    """Whether this module attends to another sequence, by what it says of itself.

    Where one class serves an encoder, a decoder and what is between them, the latter is what takes
    other keys in a decoder and is not causal. A class that does not say where it is (Moonshine)
    counts as cross-attention unless it is causal: that costs its encoder the window, and the
    statistics of calls, where the converse would be wrong.
    """
    if getattr(module, "is_cross_attention", False):
        return True
    takes_other_keys = OTHER_KEYS & inspect.signature(module.forward).parameters.keys()
    is_decoder = getattr(module, "is_decoder", True)
    return bool(takes_other_keys) and is_decoder and not getattr(module, "is_causal", False)


def head_dim(module: nn.Module) -> int | None:
    """The dim of this module's queries, where it says so under one of the usual names.

    A guess: the first call corrects it.
    """
    for name in ("qk_head_dim", "head_dim", "attention_head_size", "head_size"):
        dim = getattr(module, name, None)
        if isinstance(dim, int):
            return dim
    return None
