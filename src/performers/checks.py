"""Checks of arguments, with the text of each error once: what must hold, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

__all__ = [
    "check_attention_inputs",
    "check_attention_mask",
    "check_choice",
    "check_count",
    "check_feature_map",
    "check_key_padding_mask",
    "check_made_by",
    "check_near_field",
    "check_near_keys",
    "check_omega",
    "check_same_near_field",
    "check_seed",
    "check_segment_ids",
    "check_state",
]


# Of the keys and values that a state keeps, which are allocated ahead.
MOST_NEAR_BYTES = 16 * 2**30


def check_count(name: str, count: object, least: int = 1) -> None:
    """Raise unless a count such as `num_projections` is a whole number of at least `least`."""
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {count!r}.")


def check_seed(seed: object) -> None:
    """A seed that every generator takes; NumPy's is the narrowest."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to {2**32 - 1}, got {seed!r}.")


def check_choice(what: str, word: object, choices: Collection[str]) -> None:
    """Raise unless a word is one of the known ones; the error suggests the most similar one."""
    if word in choices:
        return
    near = difflib.get_close_matches(str(word), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {word!r}: choose one of {sorted(choices)}.{hint}")


def check_omega(x: Tensor, omega: Tensor) -> None:
    """Raise unless ω has one column for each column of x."""
    if omega.ndim != 2 or omega.shape[1] != x.shape[-1]:
        raise ValueError(
            "omega must be a matrix with one column per feature of x: omega is "
            f"{_shape(omega)}, x is {_shape(x)}. "
            f"Draw it with draw_projection(num_projections, dim={x.shape[-1]})."
        )


def check_feature_map(query: Tensor, dim: int, device: torch.device) -> None:
    """Raise unless a feature map of this dim on this device fits these queries."""
    if query.shape[-1] != dim:
        raise ValueError(
            f"the feature map is for dim {dim} per head: query is {_shape(query)}. "
            f"Make one with dim={query.shape[-1]}."
        )
    if query.device != device:
        raise ValueError(
            f"the feature map must be on the device of query: it is on {device}, query on "
            f"{query.device}. Move it with phi.to({str(query.device)!r})."
        )


def check_attention_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    enable_gqa: bool,
    scale: float | None,
) -> None:
    """Raise for shapes, dtypes and devices that do not fit each other in one call of attention."""
    named = {"query": query, "key": key, "value": value}
    for name, tensor in named.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, dim), got {_shape(tensor)}. "
                "For one head write x[None, None]; with heads third, x.transpose(1, 2)."
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be of a floating dtype, got {tensor.dtype}. Convert it with .float()."
            )
    if len({tensor.device for tensor in named.values()}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in named.items())
        raise ValueError(
            f"query, key and value must be on one device: {devices}. Move them with .to()."
        )
    if len({tensor.dtype for tensor in named.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in named.items())
        raise TypeError(
            f"query, key and value must have one dtype: {dtypes}. Convert with .to(dtype)."
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            "query and key must have the same dim per head: "
            f"query is {_shape(query)}, key is {_shape(key)}."
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            "key and value must agree in batch, heads and length: "
            f"key is {_shape(key)}, value is {_shape(value)}."
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query and key must have the same batch size: query is {_shape(query)}, "
            f"key is {_shape(key)}. Repeat the smaller with .expand()."
        )
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads and not enable_gqa:
        raise ValueError(
            f"query has {heads} heads and key has {key_heads}: they must be equal. "
            "For grouped-query attention pass enable_gqa=True."
        )
    if key_heads == 0 or heads % key_heads:
        raise ValueError(
            f"the number of key heads must divide the number of query heads: {heads} query heads, "
            f"{key_heads} key heads."
        )
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError(
            "causal attention needs one query per key: query length is "
            f"{query.shape[2]}, key length is {key.shape[2]}. To continue a sequence pass only its "
            "new queries, keys and values, with initial_state= for what came before."
        )
    if scale is not None and not (scale > 0 and scale < float("inf")):
        raise ValueError(f"scale must be positive and finite, got {scale!r}.")
    check_key_padding_mask(key_padding_mask, key)


def check_key_padding_mask(mask: Tensor | None, key: Tensor) -> None:
    """Raise unless the mask is None, or bool and (batch, key_length): True for a real key."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask must be bool with True for a real key, got {mask.dtype}. From a 0/1 "
            "attention mask write mask.bool(); an additive float mask has no linear-time form."
        )
    if mask.shape != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"key_padding_mask must be (batch, key_length) = {(key.shape[0], key.shape[2])}, "
            f"got {_shape(mask)}."
        )
    if mask.device != key.device:
        raise ValueError(
            f"key_padding_mask must be on the device of key: {mask.device} and {key.device}."
        )


def check_segment_ids(segment_ids: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise unless there is a whole number for each token, and one query per key."""
    if segment_ids.is_floating_point() or segment_ids.is_complex():
        raise TypeError(
            "segment_ids must be whole numbers, one for each token and another where a new "
            f"sequence begins, got {segment_ids.dtype}."
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "packed sequences attend to themselves, so segment_ids need one query per key: query "
            f"length is {query.shape[2]}, key length is {key.shape[2]}. In cross-attention make "
            "one call per sequence."
        )
    shape = (key.shape[0], key.shape[2])
    if segment_ids.shape != shape:
        raise ValueError(
            f"segment_ids must be (batch, length) = {shape}, got {_shape(segment_ids)}. From "
            "cumulative lengths make them by torch.repeat_interleave(torch.arange(count), lengths)."
        )


def check_attention_mask(name: str, mask: Tensor) -> None:
    """A mask of tokens in numbers has 1 for a real one and 0 for padding.

    Nothing is checked where numbers cannot be asked for: while compiling, on the meta device, and
    of a batch of `torch.func.vmap`.
    """
    if mask.dtype == torch.bool or torch.compiler.is_compiling() or mask.is_meta:
        return
    if torch._C._functorch.is_batchedtensor(mask):
        return
    other = (mask != 0) & (mask != 1)
    if other.any():
        raise ValueError(
            f"{name} must be 1 for a real token and 0 for padding, got {mask[other][0].item()}. "
            "Give each of packed sequences, which segment ids tell apart, a row of its own; of an "
            "additive mask pass mask == 0."
        )


def check_near_field(
    window_size: int | None,
    num_sinks: int,
    far: bool,
    query: Tensor,
    key: Tensor,
    *,
    estimates_softmax: bool,
    is_causal: bool,
    has_state: bool,
) -> None:
    """Raise unless an exact near field is possible with these arguments."""
    check_count("num_sinks", num_sinks, least=0)
    if window_size is None:
        if num_sinks or not far:
            given = f"num_sinks={num_sinks}" if num_sinks else "far=False"
            raise ValueError(
                f"{given} belongs to an exact near field, and window_size is None. Pass "
                "window_size= too, for example 64."
            )
        return
    check_count("window_size", window_size)
    if far and not estimates_softmax:
        raise ValueError(
            "window_size= puts exact softmax scores beside the features' estimates, so φ must be "
            "positive features of the softmax kernel, and this one is not. Use SharpFeatures, or "
            'SoftmaxFeatures with estimator="positive"; window_size=None; or '
            "far=False, for the near field alone."
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "a window needs one query per key, for distances to mean something: query length is "
            f"{query.shape[2]}, key length is {key.shape[2]}. In cross-attention use no window."
        )
    if not is_causal and has_state:
        raise ValueError(
            "a bidirectional window neither takes nor gives a state: what is near would depend on "
            "keys that were not kept, or are still to come. Pass is_causal=True, or "
            "initial_state=None and return_state=False."
        )


def check_near_keys(window_size: int | None, num_sinks: int, key: Tensor, value: Tensor) -> None:
    """What a state of a near field keeps of keys and values is not absurdly much."""
    assert window_size is not None, "only near fields keep keys"
    number = key.shape[0] * key.shape[1] * (2 * window_size + num_sinks)
    size = number * (key.shape[3] * key.element_size() + value.shape[3] * value.element_size())
    if size > MOST_NEAR_BYTES:
        raise ValueError(
            f"a state keeps the keys and values of two blocks and the sinks, however short the "
            f"sequence: with window_size={window_size} and num_sinks={num_sinks} these are "
            f"{size / 2**30:,.0f} GiB, and at most {MOST_NEAR_BYTES // 2**30} are kept. Take a "
            "smaller window, or for exact attention softmax_attention and a cache of keys."
        )


def check_same_near_field(
    made: Mapping[str, object] | None, asked: Mapping[str, object] | None
) -> None:
    """Raise unless a call has the same near field as the call that made its initial state."""
    if made != asked:
        of_state, of_call = (
            "no window" if words is None else ", ".join(f"{k}={v}" for k, v in words.items())
            for words in (made, asked)
        )
        raise ValueError(
            f"initial_state was made with {of_state}, and this call has {of_call}: pass what made "
            "it, or begin the sequence anew with initial_state=None."
        )


def check_made_by(what: str, made: object, asked: object) -> None:
    """The sums of a state are of these features, at this scale, as far as both are known."""
    if made is not None and asked is not None and made != asked:
        raise ValueError(
            f"{what} must have been made by the same features and scale: its sums are of another "
            "feature map, or phi has been redrawn, calibrated or loaded since, or scale= differs. "
            "Pass the feature map and scale that made it, or begin anew, without a state."
        )


def check_state(
    parts: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise unless a caller's state has the shapes, dtypes and devices of the empty state of this
    call.

    The keys and values that a near field remembers may have another dtype, because they are not
    sums.
    """
    for name, part in parts.items():
        if part.shape != shapes[name]:
            raise ValueError(
                f"initial_state.{name} must have shape {shapes[name]} for these inputs, got "
                f"{_shape(part)}. A state belongs to one batch, feature map, value_dim and near "
                "field; reorder its batch with state.index_select(index)."
            )
        if part.device != device:
            raise ValueError(
                f"initial_state.{name} must be on the device of value: it is on {part.device}, "
                f"value on {device}. Move the state with state.to({str(device)!r})."
            )
        is_sum = name.rpartition(".")[2] in ("log_scale", "normalizer", "values")
        if is_sum and part.dtype != dtype:
            raise TypeError(
                f"initial_state.{name} must be {dtype} for these inputs, got {part.dtype}: "
                "sums are float32, or float64 for float64 inputs. Pass a state as it was returned."
            )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
