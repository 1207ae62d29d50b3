"""Checks of arguments, with the text of each error once: what must hold, what came, what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection
from numbers import Number
from reprlib import Repr

import torch
from torch import Tensor

__all__ = [
    "check_attention_inputs",
    "check_attention_mask",
    "check_choice",
    "check_count",
    "check_feature_map",
    "check_feature_map_parts",
    "check_flags",
    "check_instance",
    "check_key_padding_mask",
    "check_made_by",
    "check_model",
    "check_not_traced",
    "check_number",
    "check_omega",
    "check_rows",
    "check_seed",
    "check_segment_ids",
    "check_state",
    "check_tensor",
    "check_tokens",
    "check_whole_number",
    "described",
    "is_finite",
    "similar",
]


# What an axis of a tensor can be as long as.
MOST = 2**63 - 1

LEARNED_SCALE = "A scale that is learned multiplies the query."

LONGEST_WORD = 100

# Of what came a message shows the ends.
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 80
SHORT.maxlevel = 2

# What attention asks of a feature map: the names of `typing.FeatureMap`.
FEATURE_MAP_PARTS = (
    "num_features",
    "default_scale",
    "is_nonnegative",
    "is_softmax",
    "fitted",
    "query_features",
    "key_features",
)

# The dtypes that attention computes with.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_instance(name: str, given: object, kinds: type | tuple[type, ...], must: str) -> None:
    """Raise unless an argument is of one of these kinds. `must`: in words, what to pass."""
    if not isinstance(given, kinds):
        raise TypeError(f"{name} must be {must}, got {described(given)}.")


def check_model(model: object) -> None:
    """Raise unless this is a module with a configuration, as models of transformers are."""
    must = "a model of transformers, with a config"
    check_instance("model", model, torch.nn.Module, must)
    if not hasattr(model, "config"):
        raise TypeError(f"model must be {must}, got {described(model)}.")


def check_flags(**flags: object) -> None:
    """Raise unless each is True or False: what is neither may mean the opposite of its truth."""
    for name, flag in flags.items():
        check_instance(name, flag, (bool, torch.SymBool), "True or False")


def check_tensor(name: str, tensor: object, layout: str = "") -> None:
    """Raise unless this is a dense tensor; one whose layout is given, of that rank, of numbers that
    attention computes with.
    """
    check_instance(name, tensor, Tensor, "a torch.Tensor (of other numbers torch.as_tensor(x))")
    assert isinstance(tensor, Tensor), "what is no tensor has been refused"
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(
            f"{name} must be a dense tensor, got {kind}. Pass x.to_dense(), or of a nested tensor "
            "x.to_padded_tensor(0.0) and the mask of its padding."
        )
    if layout and tensor.ndim != len(layout.split(", ")):
        raise ValueError(
            f"{name} must be ({layout}), got {_shape(tensor)}. "
            "For one head write x[None, None]; with heads third, x.transpose(1, 2)."
        )
    if layout and tensor.dtype not in DTYPES:
        raise _of_no_float(name, tensor)


def check_tokens(name: str, tokens: object) -> None:
    """Raise unless this is a dense tensor (batch, length) of whole numbers."""
    check_tensor(name, tokens)
    assert isinstance(tokens, Tensor), "what is no tensor has been refused"
    if tokens.ndim != 2:
        raise ValueError(f"{name} must be (batch, length), got {_shape(tokens)}.")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be whole numbers, got {tokens.dtype}. Convert them with .long()."
        )


def check_number(name: str, number: object, *, or_zero: bool = False, otherwise: str = "") -> None:
    """Raise unless this is a finite number above 0, or from 0 on. `otherwise`: what else to do."""
    if isinstance(number, (int, float, torch.SymInt, torch.SymFloat)) and number is not True:
        is_in_range = number >= 0 if or_zero else number > 0
        if is_in_range and is_finite(number):
            return
    must = "a finite number of at least 0" if or_zero else "positive and finite"
    raise ValueError(f"{name} must be {must}, got {described(number)}. {otherwise}".rstrip())


def is_finite(number: float | torch.SymInt | torch.SymFloat) -> bool:
    """Whether a number is finite as a float: `math.isfinite` fails for whole numbers beyond one."""
    return -sys.float_info.max <= number <= sys.float_info.max


def check_whole_number(name: str, number: object) -> None:
    """Raise unless this is a whole number, of any size and sign."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} must be a whole number, got {described(number)}.")


def check_count(name: str, count: object, least: int = 1) -> None:
    """Raise unless a count such as `num_projections` is a whole number of at least `least`."""
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        raise ValueError(
            f"{name} must be a whole number of at least {least}, got {described(count)}."
        )
    if count > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {described(count)}.")


def check_seed(seed: object) -> None:
    """A seed that every generator takes; NumPy's is the narrowest."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed must be a whole number from 0 to {2**32 - 1}, got {described(seed)}."
        )


def check_choice(what: str, word: object, choices: Collection[str]) -> None:
    """Raise unless a word is one of the known ones; the error suggests the most similar one."""
    if isinstance(word, str) and word in choices:
        return
    near = similar(word, choices)
    hint = f" Did you mean {near!r}?" if near else ""
    raise ValueError(f"unknown {what} {described(word)}: choose one of {sorted(choices)}.{hint}")


def similar(word: object, choices: Collection[str]) -> str | None:
    """The choice that a word was meant to be, perhaps. A long one was not, and takes long."""
    if not isinstance(word, str) or len(word) > LONGEST_WORD:
        return None
    return next(iter(difflib.get_close_matches(word, choices, n=1)), None)


def check_omega(x: Tensor, omega: Tensor) -> None:
    """Raise unless x is a tensor of rows and ω has one column for each column of x."""
    check_rows("x", x)
    check_tensor("omega", omega)
    if omega.ndim != 2 or omega.shape[1] != x.shape[-1]:
        raise ValueError(
            "omega must be a matrix with one column per feature of x: omega is "
            f"{_shape(omega)}, x is {_shape(x)}. "
            f"Draw it with draw_projection(num_projections, dim={x.shape[-1]})."
        )
    if omega.device != x.device:
        raise ValueError(
            f"omega must be on the device of x: it is on {omega.device}, x on {x.device}. Move it "
            "with omega.to(x.device)."
        )


def check_rows(name: str, x: object) -> None:
    """Raise unless this is a dense, floating tensor whose last axis is that of the features."""
    check_tensor(name, x)
    assert isinstance(x, Tensor), "what is no tensor has been refused"
    if x.ndim == 0:
        raise ValueError(f"{name} must be (..., dim), got a tensor without axes.")
    if x.dtype not in DTYPES:
        raise _of_no_float(name, x)


def check_feature_map_parts(phi: object) -> None:
    """Raise for what is no feature map, such as the class of one, or its word."""
    missing = [name for name in FEATURE_MAP_PARTS if not hasattr(phi, name)]
    if missing or isinstance(phi, type):
        lacks = f", which has no {missing[0]}" if missing else ""
        raise TypeError(
            f"phi must be a feature map, as SoftmaxFeatures(dim) is one, got {described(phi)}"
            f"{lacks}. Pass one that performers has, or an object with all that "
            "performers.typing.FeatureMap names."
        )


def check_not_traced() -> None:
    """Raise under torch.jit.trace, to which a length is a tensor; attention counts with numbers."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise RuntimeError(
            "torch.jit.trace cannot record this attention, whose graph depends on the length. Use "
            "torch.compile, or torch.export.export to save a graph (docs/export.md)."
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
        check_tensor(name, tensor, "batch, heads, length, dim")
    check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
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
    if scale is not None:
        check_number("scale", scale, otherwise=LEARNED_SCALE)
    check_key_padding_mask(key_padding_mask, key)


def check_key_padding_mask(mask: Tensor | None, key: Tensor) -> None:
    """Raise unless the mask is None, or bool and (batch, key_length): True for a real key."""
    if mask is None:
        return
    check_tensor("key_padding_mask", mask)
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
    check_tensor("segment_ids", segment_ids)
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
        check_tensor(f"initial_state.{name}", part)
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


def described(given: object) -> str:
    """What came, in a few words, whatever it is: lists may be long, and `repr` of a tensor is a
    page. All that a message shows of what has not been checked comes from here.
    """
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if given is None or isinstance(given, Number | str | list | tuple | dict | set):
        return SHORT.repr(given)
    kind = type(given)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _of_no_float(name: str, tensor: Tensor) -> TypeError:
    return TypeError(
        f"{name} must be of a floating dtype, got {tensor.dtype}. Convert it with .float()."
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
