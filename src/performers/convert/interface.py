"""The switch: FAVOR+ as an attention implementation of transformers, under the name "favor".

An architecture that asks transformers' AttentionInterface hands queries, keys and values to the
function that its configuration names, and a mask made by the function registered beside it. Here
these are `favor` and `favor_mask`. All that depends on transformers' version is in this file.

    model = AutoModel.from_pretrained(path, attn_implementation="favor")
    model.set_attn_implementation("favor")
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from performers.convert.cache import FavorCache, memory_of
from performers.convert.layer import FavorLayer, drop_keys
from performers.convert.options import FAVOR, FavorOptions
from performers.functional.readout import implied_matrix

__all__ = [
    "PREPARE_CACHE",
    "attend_exactly",
    "attention_configs",
    "attention_modules",
    "check_convertible",
    "favor",
    "favor_layer",
    "favor_mask",
    "generate_in_constant_memory",
    "head_dim",
    "is_converted",
    "is_cross_attention",
    "keys_seen",
    "layer_number",
    "layer_numbers",
    "register",
    "switch",
]

# Of models that generate: a method that puts a cache into the arguments of their calls.
PREPARE_CACHE = "_prepare_cache_for_generation"

# Arguments of an attention call that make it another function than softmax(scale · QKᵀ) V under a
# mask of padding and causality, and what they are.
OTHER_ATTENTION = {
    "position_bias": "a bias for each pair of positions",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a soft cap on its logits",
    "indices": "keys chosen for each query",
    "block_indices": "keys chosen for each query",
    "cu_seq_lens_q": "packed sequences",
    "cache": "a paged cache",
}

# Those that a module which names them passes in every call.
ALWAYS_OTHER = ("position_bias", "s_aux", "sinks", "indices", "block_indices")

# Arguments of an attention module that hold what another sequence consists of.
OTHER_KEYS = {"key_value_states", "encoder_hidden_states", "cross_attention_states"}

# How an attention that looks into its mask of pairs, before it asks the interface, is written:
# attention_mask[:, 0, …] or attention_mask[:, :, …]. Masks of padding have no such places.
READS_PAIRS = re.compile(r"\battention_mask\[:, [0:][,\]]")
PAIRS_OF_ITS_OWN = "a mask of pairs of its own (an indexer, or a mask that depends on the input)"

# What masks are made of in transformers, by the functions' names. Others are packed or custom.
PLAIN = {"causal_mask_function", "bidirectional_mask_function"}
LOCAL = {"sliding_window_overlay", "sliding_window_bidirectional_overlay", "chunked_overlay"}


def register() -> None:
    """Make `attn_implementation="favor"` known to transformers; importing performers.convert did.

    It serves every architecture that goes through transformers' AttentionInterface, with the
    default `FavorOptions` unless `config.favor` has others.
    """
    AttentionInterface.register(FAVOR, favor)
    AttentionMaskInterface.register(FAVOR, favor_mask)


def favor(
    module: nn.Module,
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch query_length heads value_dim"], Tensor | None]:
    """Attention of one layer, in the form that transformers asks for.

    `attention_mask` is what `favor_mask` returned. `dropout` drops whole keys, see `drop_keys`. The
    matrix of weights comes second where `output_attentions=True` asked for it: quadratic.

    Raises ValueError for what has no linear-time form, naming it.
    """
    layer, memory = _layer(module), memory_of(key)
    for word in OTHER_ATTENTION:
        if options.get(word) is not None:
            raise ValueError(_refusal(_name(module), f"{OTHER_ATTENTION[word]} ({word}=)"))
    options["is_causal"] = is_causal

    def attend(value: Tensor) -> Tensor:
        if layer is None:
            return attend_exactly(module, query, key, value, attention_mask, scaling, **options)
        seen = keys_seen(module, key, attention_mask, **options)
        return layer(query, key, value, **seen._asdict(), scale=scaling)

    wants_weights = _wants_weights(options)
    if memory is not None:
        past_length = memory.num_tokens - key.shape[2]
        seen = keys_seen(module, key, attention_mask, past_length=past_length, **options)
        has_state = layer is not None and layer.number not in layer.options.exact_heads
        if not has_state or memory.number != layer_number(module) or not seen.is_causal:
            raise ValueError(_foreign_cache(_name(module)))
        if wants_weights and past_length:
            raise ValueError(
                "output_attentions needs the keys of the whole sequence, and a FavorCache does not "
                "keep them. Pass the whole sequence with use_cache=False."
            )
    weights = implied_matrix(attend, key) if wants_weights else None
    if dropout:
        value = drop_keys(value, dropout)
    if memory is None:
        out = attend(value)
    else:
        assert layer is not None, "checked above"
        out = memory.attend(layer, query, key, value, seen.key_padding_mask, scaling)
    return out.transpose(1, 2).contiguous(), weights


def attend_exactly(
    module: nn.Module,
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None,
    **options: Any,
) -> Float[Tensor, "batch heads query_length value_dim"]:
    """Softmax attention as transformers computes it, for a mask that `favor_mask` made."""
    query_length, key_length = query.shape[2], key.shape[2]
    is_causal = _is_causal(module, options["is_causal"])
    if attention_mask is None and is_causal and 1 < query_length < key_length:
        # Without a mask, sdpa would take the first query for one of the first key.
        attention_mask = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
    if attention_mask is not None and attention_mask.ndim == 2:
        position = torch.arange(key_length, device=key.device)
        earlier = position <= position[key_length - query_length :, None]
        attention_mask = attention_mask[:, None, None, -key_length:] & earlier
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return out.transpose(1, 2)


class Seen(NamedTuple):
    """Which keys the queries of a call see, as `favor_attention` takes it."""

    key_padding_mask: Bool[Tensor, "batch key_length"] | None
    is_causal: bool


def keys_seen(
    module: nn.Module,
    key: Float[Tensor, "batch key_heads key_length dim"],
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None,
    sliding_window: int | None = None,
    past_length: int = 0,
    **options: Any,
) -> Seen:
    """Padding and causality, from what a layer got.

    A mask that `favor_mask` made says both: not all architectures say it in their own words too.
    Without a mask the keyword says it, or else the module, as with transformers' own functions.
    `past_length`: the number of keys before these, where a state has taken their place.

    Raises ValueError for windows shorter than the keys and for masks of pairs.
    """
    key_length = past_length + key.shape[2]
    if sliding_window is not None and sliding_window < key_length:
        raise ValueError(
            f"{_name(module)} attends to a window of {sliding_window} positions, and there are "
            f"{key_length} keys: FAVOR+ would see them all. Keep such layers exact with "
            "FavorOptions(layers=...), or use another attn_implementation."
        )
    if attention_mask is None:
        return Seen(None, _is_causal(module, is_causal))
    if attention_mask.dtype == torch.bool and attention_mask.ndim == 2:
        return Seen(attention_mask[:, -key.shape[2] :], is_causal=True)
    if attention_mask.dtype == torch.bool and attention_mask.shape[1:-1] == (1, 1):
        return Seen(attention_mask[:, 0, 0, -key.shape[2] :], is_causal=False)
    raise ValueError(
        f"{_name(module)} got a mask of pairs, {attention_mask.dtype} "
        f"{tuple(attention_mask.shape)}: a window shorter than the input, a bias, packed sequences "
        "or a mask of your own. FAVOR+ sees padding, (batch, length), and causality. Pass a "
        "two-dimensional attention_mask, keep such layers exact with FavorOptions(layers=...), or "
        "use another attn_implementation."
    )


def favor_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    config: PreTrainedConfig | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask of one forward pass: which keys are real, None for all.

    Its shape says how they are seen: (batch, key_length) causally, (batch, 1, 1, key_length) in
    both directions. Where a window or a chunk is shorter than the keys, it is the mask of pairs
    that transformers makes for exact attention: layers that stay exact use it, others refuse it.

    Raises ValueError for packed sequences, custom masks and static caches. While compiling,
    transformers declares every causal mask packed, so packed sequences are not noticed then.
    """
    if torch.compiler.is_compiling():
        is_plain, is_fixed = not use_vmap, isinstance(q_offset, Tensor)
    else:
        if config is not None:
            _check_architecture(type(config).__name__, type(config).__module__)
        parts = set(_parts(mask_function))
        is_plain = parts <= PLAIN | LOCAL and not use_vmap
        is_fixed = isinstance(q_offset, Tensor) or (
            "causal_mask_function" in parts and kv_length != q_offset + q_length - kv_offset
        )
    if not is_plain:
        raise ValueError(
            "FAVOR+ sees padding and causality, and this model attends with packed sequences or a "
            "custom mask of pairs, which has no linear-time form. Give packed sequences as rows of "
            "a padded batch with an attention_mask, or use another attn_implementation."
        )
    if is_fixed:
        raise ValueError(
            "FAVOR+ would count the empty places of a cache of fixed length: there are "
            f"{kv_length} keys for {q_length} queries. Generate with the default cache, not with "
            "cache_implementation='static'."
        )
    if local_size is not None and local_size < kv_length:
        mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            use_vmap=use_vmap,
            config=config,
            **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
        )
        return mask
    if attention_mask is None:
        return None
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    # Only masks that are not causal are made with this option.
    return keys[:, None, None] if "allow_is_bidirectional_skip" in options else keys


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that ask the AttentionInterface, by name, in the order of the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if "get_interface(" in _source(module)
    }


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The model's configuration, then those of parts that attention modules read."""
    configs = [model.config, *(module.config for module in attention_modules(model).values())]
    return list({id(config): config for config in configs}.values())


def check_convertible(model: PreTrainedModel, options: FavorOptions) -> None:
    """Raise if the model cannot be converted with these options, as far as shows without a call."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a model of transformers is converted, got {type(model).__name__}. Of a wrapped model "
            "pass the one inside, such as peft_model.get_base_model()."
        )
    modules = attention_modules(model)
    if not modules or any(_attends_by_itself(_source(module)) for module in model.modules()):
        raise ValueError(_own_attention(type(model).__name__))
    for name, module in modules.items():
        if _reads_pairs(_source(module)):  # of all modules: those that stay exact get no pairs too
            raise ValueError(_refusal(f"{type(module).__name__} ({name})", PAIRS_OF_ITS_OWN))
    numbers = layer_numbers(model)
    missing = set(options.layers or ()) - set(numbers.values())
    if missing:
        raise ValueError(
            f"{type(model).__name__} has no layer {', '.join(map(str, sorted(missing)))}: its "
            f"layers are 0 to {max(numbers.values())}."
        )
    converted = [name for name in modules if is_converted(modules[name], options, numbers[name])]
    if not converted:
        raise ValueError(
            f"layers={options.layers!r} leaves no layer of {type(model).__name__} to convert."
        )
    _check_heads(model, options, {numbers[name]: modules[name] for name in converted})
    for name in converted:
        source = _source(modules[name])
        for word in ALWAYS_OTHER:
            if re.search(rf"\b{word}=", source):
                kind = f"{OTHER_ATTENTION[word]} ({word}=)"
                raise ValueError(_refusal(f"{type(modules[name]).__name__} ({name})", kind))


def _check_heads(
    model: PreTrainedModel, options: FavorOptions, converted: dict[int, nn.Module]
) -> None:
    """Raise unless the heads that are to stay exact belong to converted layers."""
    for layer, heads in options.exact_heads.items():
        if layer not in converted:
            raise ValueError(
                f"exact_heads must be those of converted layers: layer {layer} of "
                f"{type(model).__name__} is none of {', '.join(map(str, sorted(converted)))}."
            )
        config: Any = converted[layer].config
        num_heads = getattr(config, "num_attention_heads", None)
        if num_heads is not None and (heads[-1] >= num_heads or len(heads) == num_heads):
            raise ValueError(
                f"exact_heads must be some of the heads 0 to {num_heads - 1} of layer {layer}, got "
                f"{heads}. To keep all exact, leave the layer out of layers."
            )
    if options.exact_heads and None in map(layer_number, attention_modules(model).values()):
        raise ValueError(
            f"exact_heads needs layers that carry a number, and some of {type(model).__name__} do "
            "not. Choose layers= instead."
        )


def layer_numbers(model: PreTrainedModel) -> dict[str, int]:
    """The number of each attention module's layer; those that carry none are counted."""
    numbers = {}
    uncounted = 0
    for name, module in attention_modules(model).items():
        number = layer_number(module)
        if number is None:
            number, uncounted = uncounted, uncounted + 1
        numbers[name] = number
    return numbers


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


def favor_layer(module: nn.Module, options: FavorOptions) -> FavorLayer:
    """What converts this module: a function of the two alone, so that it comes back when loaded."""
    return FavorLayer(options, layer_number(module) or 0, is_cross_attention(module))


def head_dim(module: nn.Module) -> int | None:
    """The dim of this module's queries, where it says so under one of the usual names.

    A guess: the first call corrects it.
    """
    for name in ("qk_head_dim", "head_dim", "attention_head_size", "head_size"):
        dim = getattr(module, name, None)
        if isinstance(dim, int):
            return dim
    return None


def switch(model: PreTrainedModel, implementation: str) -> None:
    """`set_attn_implementation`, for which a model that does not obey is an error."""
    model.set_attn_implementation(implementation)
    for name, module in attention_modules(model).items():
        config: Any = module.config
        if config._attn_implementation != implementation:
            raise ValueError(
                f"{type(module).__name__} ({name}) stayed with the attention implementation "
                f"{config._attn_implementation!r}: transformers cannot switch this model."
            )


def generate_in_constant_memory(model: PreTrainedModel) -> None:
    """Let `model.generate` make a `FavorCache` where it makes a DynamicCache of its own accord.

    It does so in a private method of transformers. Where there is none, or one with other
    arguments, nothing changes: the model then keeps all keys and writes the same, only slower.
    """
    method = getattr(type(model), PREPARE_CACHE, None)
    known = ["self", "generation_config", "model_kwargs"]
    if method is not None and list(inspect.signature(method).parameters)[: len(known)] == known:
        setattr(model, PREPARE_CACHE, MethodType(_prepare_cache, model))


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
) -> None:
    name = "past_key_values"
    is_given = model_kwargs.get(name) is not None
    getattr(type(model), PREPARE_CACHE)(model, generation_config, model_kwargs, *args)
    made = model_kwargs.get(name)
    if is_given or made is None:
        return
    if isinstance(made, EncoderDecoderCache):
        # The keys of cross-attention are those of the input, whose number does not grow.
        if type(made.self_attention_cache) is DynamicCache:
            made.self_attention_cache = FavorCache(model.config)
    elif type(made) is DynamicCache:
        model_kwargs[name] = FavorCache(model.config)


def _layer(module: nn.Module) -> FavorLayer | None:
    """What converts this attention module, made if this is its first call; None if it is exact."""
    if not hasattr(module, FAVOR):
        setattr(module, FAVOR, _new_layer(module))
    layer: FavorLayer | None = getattr(module, FAVOR)
    return layer


def _new_layer(module: nn.Module) -> FavorLayer | None:
    """The layer for a model that was switched or loaded by transformers, not by `linearize`."""
    written = getattr(module.config, FAVOR, None) or {}
    options = FavorOptions.of(module.config)
    number = layer_number(module)
    if written.get("tensors") or (options.layers is not None and number is None):
        raise ValueError(
            "this model was converted with calibration, or in part, which takes more than its "
            "config to load: use performers.load_linearized(AutoModel..., path)."
        )
    return favor_layer(module, options) if is_converted(module, options, number or 0) else None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """What a call without a mask says: the keyword, or else the module."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _wants_weights(options: dict[str, Any]) -> bool:
    """Whether this forward pass was called with output_attentions=True."""
    if options.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    wanted = _active_collector.get()  # transformers collects outputs that its hooks see
    return any("attentions" in kind for kind in wanted or ())


def _parts(mask_function: Any) -> Iterator[str]:
    """Names of the functions that a mask function is made of, without those that combine."""
    name = mask_function.__qualname__.split(".")[0]
    if name not in {"and_masks", "or_masks"}:
        yield name
        return
    for cell in mask_function.__closure__:
        for part in cell.cell_contents:
            yield from _parts(part)


@cache
def _check_architecture(config_class: str, configuration_module: str) -> None:
    """Refuse a model that makes masks by transformers' functions but attends by its own, or looks
    into them for what a mask of FAVOR+ does not have.
    """
    modeling = sys.modules.get(configuration_module.replace(".configuration_", ".modeling_"))
    source = "" if modeling is None else inspect.getsource(modeling)
    for text in re.split(r"^(?=class |def )", source, flags=re.MULTILINE):
        if _attends_by_itself(text):
            raise ValueError(_own_attention(config_class.removesuffix("Config")))
        if _reads_pairs(text):
            raise ValueError(_refusal(config_class.removesuffix("Config"), PAIRS_OF_ITS_OWN))


def _attends_by_itself(source: str) -> bool:
    """Whether this text of a class is that of an attention which asks no interface for it."""
    is_attention = re.match(r"class \w*Attention\(", source) is not None
    return (
        is_attention
        and "attention_mask" in source
        and "softmax(" in source
        and ("get_interface(" not in source)
    )


def _reads_pairs(source: str) -> bool:
    """Whether this text of a class is that of an attention which looks into a mask of pairs."""
    return "get_interface(" in source and READS_PAIRS.search(source) is not None


def _own_attention(name: str) -> str:
    return (
        f"{name} computes attention, or some of it, by itself and not through transformers' "
        "AttentionInterface, so it cannot be converted."
    )


def _source(module: nn.Module) -> str:
    """The text of a module's class and of those that it derives from, but for those of torch."""
    return _source_of(type(module))  # type: ignore[arg-type]  # mypy sees Module.__hash__ here


@cache
def _source_of(module_class: type) -> str:
    # PreTrainedModel talks about the interface, too.
    classes = [c for c in module_class.__mro__ if c not in PreTrainedModel.__mro__]
    try:
        return "".join(inspect.getsource(c) for c in classes)
    except (OSError, TypeError):  # classes without a file
        return ""


def _refusal(name: str, kind: str) -> str:
    return (
        f"{name} attends with {kind}, which is not softmax(scale · QKᵀ) V and has no linear-time "
        "form. Use another attn_implementation for this model."
    )


def _foreign_cache(name: str) -> str:
    return (
        f"{name} got keys that belong to another layer of a FavorCache: the cache was made for "
        "another configuration, or layers share their keys, or this is cross-attention. Make it by "
        "FavorCache(model.config), for an encoder and a decoder by "
        "EncoderDecoderCache(FavorCache(model.config), DynamicCache())."
    )


def _name(module: nn.Module) -> str:
    number = layer_number(module)
    return type(module).__name__ + ("" if number is None else f" of layer {number}")


register()
