"""Where a model of transformers attends: found by one walk over its modules, then passed along.

    sites = Sites.of(model)
    check_convertible(sites, options)
    sites.switch(FAVOR)

A site is a module that asks transformers' AttentionInterface for its attention, so that what it
gets can be replaced. Nothing else of a model is touched by a conversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from performers.checks import check_model
from performers.convert.layer import FavorLayer
from performers.convert.options import FAVOR, FavorOptions, is_within
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
    "is_unmoved_by_shifts",
    "layer_number",
    "layer_types",
]

# Rotations of transformers whose angles do not depend on the length, and what describes them. Other
# words describe other uses of positions, such as several for each token.
FIXED_ROTATIONS = {"default", "linear", "llama3", "yarn", "proportional"}
FIXED_ANGLES = {
    "rope_type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "truncate",
}  # fmt: skip

# Arguments of an attention module that hold what another sequence consists of.
OTHER_KEYS = {"key_value_states", "encoder_hidden_states", "cross_attention_states"}


@dataclass(frozen=True)
class Site:
    """One attention module of a model, by its name there.

    `base_name`: its name in the model without its head, which AutoModel loads.
    `number`: that of its layer; modules that carry none are counted, in the order of the model.
    """

    name: str
    base_name: str
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

    `by_themselves`: names of other modules, which compute attention and ask no interface for it.
    `configured`: the modules that hold a configuration, by their names. Those that are models make
    the masks of their attention, so attention is switched for a whole model, or for models in it.
    """

    model: PreTrainedModel
    found: tuple[Site, ...]
    by_themselves: tuple[str, ...]
    configured: Mapping[str, nn.Module]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sites:
        """Find them. Cost: one walk over all modules; classes are read once in a process."""
        check_model(model)
        found: list[Site] = []
        by_themselves: list[str] = []
        configured: dict[str, nn.Module] = {}
        uncounted = 0
        for name, module in model.named_modules():
            if any(isinstance(held, PreTrainedConfig) for held in vars(module).values()):
                configured[name] = module
            source = source_of(module)
            if attends_by_itself(source):
                by_themselves.append(name)
            if asks_the_interface(source):
                number = layer_number(module)
                if number is None:
                    number, uncounted = uncounted, uncounted + 1
                base_name = name.removeprefix(f"{model.base_model_prefix}.")
                found.append(Site(name, base_name, module, number))
        return cls(model, tuple(found), tuple(by_themselves), configured)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.found)

    @property
    def layers(self) -> dict[Site, FavorLayer]:
        """What attends in the place of the pretrained layers now, where they are converted."""
        layers = {site: getattr(site.module, FAVOR, None) for site in self.found}
        return {site: layer for site, layer in layers.items() if layer is not None}

    def configs(self, options: FavorOptions) -> list[PreTrainedConfig]:
        """The model's configuration, then those that the attention modules of these parts read."""
        inside: list[Any] = [site.module.config for site in self.within(options)]
        return list({id(config): config for config in (self.model.config, *inside)}.values())

    def within(self, options: FavorOptions) -> Sites:
        """Those in the parts that the options name; all of them where no parts are named."""
        roots = list(self.roots(options))

        def is_inside(name: str) -> bool:
            return any(not root or is_within(name, root) for root in roots)

        return Sites(
            self.model,
            tuple(site for site in self.found if is_inside(site.name)),
            tuple(name for name in self.by_themselves if is_inside(name)),
            {name: module for name, module in self.configured.items() if is_inside(name)},
        )

    def roots(self, options: FavorOptions) -> dict[str, PreTrainedModel]:
        """The models whose attention these options switch, by name: the whole model, or for each
        named part the smallest model that holds it. None of them is inside another.
        """
        if not isinstance(options.layers, Mapping):
            return {"": self.model}
        models = {
            name: module
            for name, module in self.configured.items()
            if isinstance(module, PreTrainedModel)
        }
        found: dict[str, PreTrainedModel] = {}
        for site in self.found:
            for part in options.layers:
                if is_within(site.base_name, part):
                    # the part by its name in this model, head included
                    whole = site.name.removesuffix(site.base_name) + part
                    holds = [name for name in models if not name or is_within(whole, name)]
                    found[max(holds, key=len)] = models[max(holds, key=len)]
        return {
            name: model
            for name, model in found.items()
            if not any(name != other and (not other or is_within(name, other)) for other in found)
        }

    def switch(self, implementation: str, options: FavorOptions) -> None:
        """`set_attn_implementation`, for which a model that does not obey is an error."""
        for root in self.roots(options).values():
            root.set_attn_implementation(implementation)
        for site in self.within(options):
            config: Any = site.module.config
            if config._attn_implementation != implementation:
                raise ValueError(
                    f"{site.title} stayed with the attention implementation "
                    f"{config._attn_implementation!r}: transformers cannot switch this model."
                )


def check_convertible(sites: Sites, options: FavorOptions) -> None:
    """Raise if the model cannot be converted with these options, as far as shows without a call."""
    title = type(sites.model).__name__
    is_attending = bool(sites.found)
    if is_attending and isinstance(options.layers, Mapping):
        _check_parts(sites, options.layers)
        sites = sites.within(options)
    if not is_attending or sites.by_themselves:
        raise ValueError(own_attention(title))
    for site in sites:  # all of them: those that stay exact get no mask of pairs either
        if reads_pairs(source_of(site.module)):
            raise ValueError(refusal(site.title, PAIRS_OF_ITS_OWN))
    if not isinstance(options.layers, Mapping):
        _check_numbers(title, options.layers, list(sites))
    chosen = [site for site in sites if is_converted(site, options)]
    if not chosen:
        raise ValueError(f"layers={options.layers!r} leaves no layer of {title} to convert.")
    _check_heads(sites, options, {site.number: site.module for site in chosen})
    for site in chosen:
        kinds = other_attention_of_class(source_of(site.module))
        if kinds:
            raise ValueError(refusal(site.title, kinds[0]))


def _check_parts(sites: Sites, layers: Mapping[str, Sequence[int] | None]) -> None:
    """Refuse names of parts that attend nowhere, and numbers of layers that a part has not."""
    title = type(sites.model).__name__
    for part, numbers in layers.items():
        inside = [site for site in sites if is_within(site.base_name, part)]
        if not inside:
            raise ValueError(
                f"{title} has no part {part!r} that attends: it attends in "
                f"{', '.join(site.base_name for site in sites) or 'no part'}. Name a beginning of "
                "these in layers, up to a dot."
            )
        _check_numbers(f"{part} of {title}", numbers, inside)


def _check_numbers(title: str, given: Sequence[int] | None, sites: Sequence[Site]) -> None:
    numbers = {site.number for site in sites}
    missing = set(given or ()) - numbers
    if missing:
        raise ValueError(
            f"{title} has no layer {', '.join(map(str, sorted(missing)))}: its layers are 0 to "
            f"{max(numbers)}."
        )


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


def is_converted(site: Site, options: FavorOptions) -> bool:
    """Whether FAVOR+ takes the place of this module's attention."""
    return options.converts(site.number, layer_types(site.module), site.base_name)


def layer_types(module: nn.Module) -> Sequence[str]:
    """The kinds of the layers of this module's model, where they have numbers and kinds."""
    has_number = layer_number(module) is not None
    return (getattr(module.config, "layer_types", None) if has_number else None) or ()


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


def is_unmoved_by_shifts(model: PreTrainedModel) -> bool:
    """Whether this model, given `position_ids` that are all shifted by one number, gives the same.

    So it is where positions are rotations of q and k by fixed angles, and nothing else: q·k then
    depends on differences alone.
    """
    config: Any = model.config.get_text_config(decoder=True)
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    rope = getattr(config, "rope_parameters", None)
    if not takes_positions or not rope or config.is_encoder_decoder:
        return False
    is_scaled_by_position = getattr(config, "attn_temperature_tuning", False)
    by_kind = [rope] if "rope_type" in rope else list(rope.values())
    return not is_scaled_by_position and all(
        FIXED_ANGLES.issuperset(one) and one.get("rope_type") in FIXED_ROTATIONS for one in by_kind
    )


def head_dim(module: nn.Module) -> int | None:
    """The dim of this module's queries, where it says so under one of the usual names.

    A guess: the first call corrects it.
    """
    for name in ("qk_head_dim", "head_dim", "attention_head_size", "head_size"):
        dim = getattr(module, name, None)
        if isinstance(dim, int):
            return dim
    return None
