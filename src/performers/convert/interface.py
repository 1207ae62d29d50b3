"""The switch: FAVOR+ as an attention implementation of transformers, under the name "favor".

An architecture that asks transformers' AttentionInterface hands queries, keys and values to the
function that its configuration names, and a mask made by the function registered beside it. Here
these are `favor` and `favor_mask`. Which modules ask it is in `performers.convert.sites`.

    model = AutoModel.from_pretrained(path, attn_implementation="favor")
    model.set_attn_implementation("favor")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    and_masks,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from performers.convert.blocks import BLOCKS, is_of_blocks, keys_of_blocks, mask_of_blocks
from performers.convert.cache import memory_of
from performers.convert.layer import FavorLayer, drop_keys
from performers.convert.options import FAVOR, FavorOptions
from performers.convert.packing import is_packed, segments, within_sequences
from performers.convert.plain_attention import check_architecture, other_attention, refusal
from performers.convert.sites import is_cross_attention, layer_number, layer_types
from performers.functional.masks import Seen, is_hidden, keys_of_pairs
from performers.functional.readout import apply_matrix, implied_matrix
from performers.functional.softmax import softmax_attention

__all__ = ["attend_exactly", "favor", "favor_layer", "favor_mask", "keys_seen", "register"]

# What masks are made of in transformers, by the functions' names. Others are custom.
PLAIN = {"causal_mask_function", "bidirectional_mask_function"}
PACKED = "packed_sequence_mask_function"
COMBINING = {"and_masks", "or_masks", "remap_positions_for_packed_sequence"}
# The functions that `or_masks` and `and_masks` make, by their own names.
UNIONS, INTERSECTION = {"or_mask"}, "and_mask"
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
    kinds = other_attention(options)
    if kinds:
        raise ValueError(refusal(_name(module), kinds[0]))
    options["is_causal"] = is_causal

    def attend(value: Tensor) -> Tensor:
        if layer is None:
            return attend_exactly(module, query, key, value, attention_mask, scaling, **options)
        seen = keys_seen(module, query, key, attention_mask, **options)
        return layer(query, key, value, **seen._asdict(), scale=scaling)

    wants_weights = _wants_weights(options)
    if memory is not None:
        past_length = memory.num_tokens - key.shape[2]  # the memory has counted these keys already
        seen = keys_seen(module, query, key, attention_mask, past_length=past_length, **options)
        has_state = layer is not None and layer.number not in layer.options.exact_heads
        # A single query, the last position, sees every key; an encoder's keys are not its own.
        is_causal = seen.is_causal or seen.seen_lengths is not None or query.shape[2] == 1
        is_own = memory.number == layer_number(module) and query.shape[2] == key.shape[2]
        if seen.segment_ids is not None:
            raise ValueError(
                f"{_name(module)} got packed sequences and a FavorCache, which continues one "
                "sequence per row: pass use_cache=False, or each sequence in a row of its own."
            )
        if not (has_state and is_own and is_causal):
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
        out = attend(value) if weights is None else apply_matrix(weights, value)
    else:
        assert layer is not None, "checked above"
        out = memory.attend(layer, query, key, value, seen, scaling)
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
    attention_mask = within_sequences(module, query, key, attention_mask, options)
    segment_ids = segments(module, query, key, attention_mask, is_causal, options)
    if segment_ids is not None or is_of_blocks(attention_mask):
        # Where a window is shorter than the keys, there is a mask of pairs.
        options["sliding_window"] = None
        seen = keys_seen(module, query, key, attention_mask, **options)
        return softmax_attention(
            query, key, value, scale=scaling, enable_gqa=True, **seen._asdict()
        )
    if attention_mask is None and is_causal and 1 < query_length < key_length:
        # Without a mask, sdpa would take the first query for one of the first key.
        attention_mask = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool)
    if attention_mask is not None and attention_mask.ndim == 2:
        # The queries are the last of the sequence that the keys are.
        position = torch.arange(key_length, device=key.device)
        earlier = position <= position[key_length - query_length :, None]
        attention_mask = attention_mask[:, None, None, -key_length:] & earlier
    out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, attention_mask, scaling=scaling, **options
    )
    return out.transpose(1, 2)


def keys_seen(
    module: nn.Module,
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None,
    sliding_window: int | None = None,
    past_length: int | None = None,
    **options: Any,
) -> Seen:
    """Padding and causality, from what a layer got.

    A mask that `favor_mask` made says both: not all architectures say it in their own words too.
    Without a mask the keyword says it, or else the module, as with transformers' own functions.
    `past_length`: the number of keys before these, where a state takes their place.

    A mask of pairs of the caller's own may be causality, padding or packed sequences in other
    words.

    Raises ValueError for windows shorter than the keys and for other masks of pairs.
    """
    key_length = (past_length or 0) + key.shape[2]
    if sliding_window is not None and sliding_window < key_length:
        raise ValueError(
            f"{_name(module)} attends to a window of {sliding_window} positions, and there are "
            f"{key_length} keys: FAVOR+ would see them all. Keep such layers exact with "
            "FavorOptions(layers=...), or use another attn_implementation."
        )
    is_causal = _is_causal(module, is_causal)
    attention_mask = within_sequences(module, query, key, attention_mask, options)
    segment_ids = segments(module, query, key, attention_mask, is_causal, options)
    if attention_mask is None:
        return Seen(None, is_causal, segment_ids)
    if is_packed(attention_mask):
        return Seen(None, True, segment_ids)
    if is_of_blocks(attention_mask):
        return keys_of_blocks(attention_mask)
    if attention_mask.dtype == torch.bool and attention_mask.ndim == 2:
        return Seen(attention_mask[:, -key.shape[2] :], True, segment_ids)
    if attention_mask.dtype == torch.bool and attention_mask.shape[1:-1] == (1, 1):
        return Seen(attention_mask[:, 0, 0, -key.shape[2] :], False, segment_ids)
    shape = (query.shape[0], -1, query.shape[2], key_length)
    pairs = _keys_of_pairs(attention_mask, shape, is_causal)
    if isinstance(pairs, str):
        raise ValueError(
            f"{_name(module)} got a mask of pairs, {attention_mask.dtype} "
            f"{tuple(attention_mask.shape)}, and {pairs}: a window shorter than the input, a bias "
            "or a mask of your own. FAVOR+ sees padding, (batch, length), causality, packed "
            "sequences, and of each query the first keys, however many. Pass a two-dimensional "
            "attention_mask, keep such layers exact with FavorOptions(layers=...), or use another "
            "attn_implementation."
        )
    mask, seen = pairs.key_padding_mask, pairs.seen_lengths
    is_whole = not pairs.is_causal and seen is None and query.shape[2] == key_length > 1
    if is_whole and (is_causal or past_length == 0) and not is_cross_attention(module):
        # A prompt that sees itself whole, which other tokens follow.
        lengths = torch.full((query.shape[0],), key_length, device=query.device)
        pairs = pairs._replace(is_causal=True, prefix_lengths=lengths)
    return pairs._replace(
        key_padding_mask=None if mask is None else mask[:, -key.shape[2] :],
        seen_lengths=None if seen is None else seen - (past_length or 0),  # those of a state aside
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
    both directions. Of packed sequences it is their numbers, int64, (batch, key_length); of blocks
    that see each other what `mask_of_blocks` makes. Where a window or a chunk is shorter than the
    keys, or blocks go with what is in the cache, it is the mask of pairs that transformers makes
    for exact attention: layers that stay exact use it, others read it or refuse it.

    Raises ValueError for custom masks and static caches. While compiling, transformers declares
    every causal mask packed, and then so does this one.
    """
    packed = blocks = None
    is_local = local_size is not None and local_size < kv_length
    if torch.compiler.is_compiling():
        # No more of a mask function can be asked.
        is_plain = not use_vmap and mask_function.__name__ not in UNIONS
        is_fixed = isinstance(q_offset, Tensor)
    else:
        if config is not None:
            check_architecture(type(config).__name__, type(config).__module__)
        parts = dict(_parts(mask_function))
        is_plain = parts.keys() <= PLAIN | LOCAL | {PACKED, BLOCKS}
        packed, blocks = parts.get(PACKED), parts.get(BLOCKS)
        # Of a model that makes the window itself no one says how wide it is.
        is_local = is_local or (use_vmap and not parts.keys().isdisjoint(LOCAL))
        # A cache of fixed length offers empty places as keys. A causal mask shows it: otherwise the
        # last query stands where the last key does.
        is_fixed = isinstance(q_offset, Tensor) or (
            "causal_mask_function" in parts and kv_length != q_offset + q_length - kv_offset
        )
    if not is_plain:
        raise ValueError(
            "FAVOR+ sees padding, causality, packed sequences and, unless compiled, blocks of "
            "positions that see each other, and this model attends with a custom mask of pairs, "
            "which has no linear-time form. Use another attn_implementation."
        )
    if is_fixed:
        raise ValueError(
            "FAVOR+ would count the empty places of a cache of fixed length: there are "
            f"{kv_length} keys for {q_length} queries. Generate with the default cache, not with "
            "cache_implementation='static'."
        )
    mask: Tensor | None = None
    if blocks is not None and q_length == 1:
        blocks = None  # the last position sees all
    if blocks is not None and packed is None and q_length == kv_length:
        mask = mask_of_blocks(blocks, attention_mask, kv_length)
    if is_local or (blocks is not None and mask is None):
        # Never None for a mask that sdpa could do without: here None means that every key is seen.
        mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
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
    if mask is not None:
        return mask
    if packed is not None:
        (numbers,) = (cell.cell_contents for cell in packed.__closure__)
        return numbers
    if attention_mask is None:
        is_causal = "allow_is_bidirectional_skip" not in options
        may_be_packed = torch.compiler.is_compiling() and mask_function.__name__ == INTERSECTION
        if is_causal and may_be_packed and q_length == kv_length > 1:
            return _numbers(mask_function, batch_size, q_length, options["device"])
        return None
    keys = attention_mask[:, kv_offset : kv_offset + kv_length]
    # Only masks that are not causal are made with this option.
    return keys[:, None, None] if "allow_is_bidirectional_skip" in options else keys


def _numbers(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: torch.device
) -> Int[Tensor, "batch length"]:
    """The numbers of packed sequences, asked of a mask function pair by pair: one begins where a
    token does not see the one before."""
    row = torch.arange(batch_size, device=device).unsqueeze(1)
    place = torch.arange(length, device=device).unsqueeze(0)
    goes_on = mask_function(row, torch.zeros_like(row), place, (place - 1).clamp(min=0))
    return (~goes_on).cumsum(dim=1)


def favor_layer(module: nn.Module, options: FavorOptions) -> FavorLayer:
    """What converts this module: a function of the two alone, so that it comes back when loaded."""
    return FavorLayer(options, layer_number(module) or 0, is_cross_attention(module))


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
    is_in_part = isinstance(options.layers, Mapping) or (options.layers and number is None)
    if written.get("tensors") or is_in_part:
        raise ValueError(
            "this model was converted with calibration, or in part, which takes more than its "
            "config to load: use performers.load_linearized(AutoModel..., path)."
        )
    is_converted = options.converts(number or 0, layer_types(module))
    return favor_layer(module, options) if is_converted else None


def _is_causal(module: nn.Module, is_causal: bool | None) -> bool:
    """What a call without a mask says: the keyword, or else the module."""
    return bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal


def _keys_of_pairs(mask: Tensor, shape: tuple[int, ...], prefers_causal: bool) -> Seen | str:
    """What a mask of the caller's own says, which transformers hands on untouched; or why FAVOR+
    cannot see so. `shape` has −1 for the heads.
    """
    if torch.compiler.is_compiling():
        return "a compiled model cannot look into it"
    try:
        mask = mask.expand(shape)
    except RuntimeError:
        return "it is not (batch, heads, query_length, key_length)"
    if mask.dtype == torch.bool:
        return keys_of_pairs(mask, prefers_causal=prefers_causal)
    hidden = is_hidden(mask) if mask.is_floating_point() else None
    if hidden is None:
        return "it adds, or learns to add, numbers other than 0 and those that hide, at most -1e4"
    return keys_of_pairs(~hidden, prefers_causal=prefers_causal)


def _wants_weights(options: dict[str, Any]) -> bool:
    """Whether this forward pass was called with output_attentions=True."""
    if options.get("output_attentions"):
        return True
    if torch.compiler.is_compiling():
        return False
    wanted = _active_collector.get()  # transformers collects outputs that its hooks see
    return any("attentions" in kind for kind in wanted or ())


def _parts(mask_function: Any) -> Iterator[tuple[str, Any]]:
    """The functions that a mask function is made of, by name, without those that combine. What is
    not of transformers has its module before its name.
    """
    name = mask_function.__qualname__.split(".")[0]
    if mask_function.__module__ != and_masks.__module__:
        name = f"{mask_function.__module__}.{name}"
    if name not in COMBINING:
        yield name, mask_function
        return
    for cell in mask_function.__closure__:
        held = cell.cell_contents
        for part in held if isinstance(held, tuple) else (held,):
            if callable(part):  # others are positions
                yield from _parts(part)


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
