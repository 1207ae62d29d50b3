"""The contraction of linear attention: out = D⁻¹ Q′ (K′ᵀ V), never forming the matrix Q′K′ᵀ."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends import BACKENDS, Call, choose_backend
from performers.checks import (
    LEARNED_SCALE,
    check_attention_inputs,
    check_feature_map_parts,
    check_flags,
    check_instance,
    check_made_by,
    check_not_traced,
    check_number,
    check_state,
)
from performers.functional.autocast import autocast_inputs, without_autocast
from performers.functional.near_field import (
    check_near_field,
    check_near_keys,
    check_same_near_field,
)
from performers.state import LinearState, Maker, NearField, NearKeys
from performers.typing import FeatureMap, is_log_linear

__all__ = ["linear_attention"]


def linear_attention(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: FeatureMap,
    *,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float = 1.0,
    normalize: bool = True,
    enable_gqa: bool = False,
    window_size: int | None = None,
    num_sinks: int = 0,
    far: bool = True,
    far_limit: float | None = None,
    num_heavy: int = 0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch heads query_length value_dim"], LinearState | None]:
    """Attention with kernel κ(q, k) = φ(√scale q)·φ(√scale k), and the state after the keys.

        bidirectional:  out_i = Σ_j κ(q_i, k_j) v_j / Σ_j κ(q_i, k_j)
        causal:         the sums run over j ≤ i

    With `window_size`, the keys of a near field (`NearField`) are scored by exp(scale · q·k), not
    by κ: for positive features of the softmax kernel, and for one query per key. Without `far` the
    other keys are left out; `far_limit` bounds their weight by a multiple of what is near.

    Returns the output and, with `return_state`, the state, else None.

    φ is applied tile by tile inside the backend, so features are never stored. Sums and states are
    float32 (float64 for float64 inputs), under autocast too, which casts the inputs and nothing
    else; the output has the dtype of `query`.

    Cost: O(length · num_features · value_dim) time, O(length · (dim + value_dim)) memory.
    Source: Choromanski et al. 2021, Section 2.5.1 and Algorithm 1.
    """
    check_not_traced()
    query, key, value = autocast_inputs(query, key, value)
    check_attention_inputs(
        query,
        key,
        value,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    check_feature_map_parts(phi)
    check_number("scale", scale, otherwise=LEARNED_SCALE)
    check_flags(normalize=normalize, far=far, return_state=return_state)
    check_instance(
        "initial_state", initial_state, (LinearState, type(None)), "a LinearState or None"
    )
    has_state = return_state or initial_state is not None
    check_near_field(
        window_size,
        num_sinks,
        far,
        far_limit,
        num_heavy,
        query,
        key,
        estimates_softmax=phi.is_softmax and is_log_linear(phi),
        is_causal=is_causal,
        has_state=has_state,
    )
    near = None if window_size is None else NearField(window_size, num_sinks, far, num_heavy)
    if near is not None and has_state:
        check_near_keys(window_size, num_sinks + num_heavy, key, value)
    elif near is not None and not torch.compiler.is_compiling():  # where lengths are symbols
        # A block, and the first tokens, are no longer than all of them.
        length = max(1, key.shape[2])
        near = NearField(
            min(near.window_size, length), min(num_sinks, length), far, min(num_heavy, length)
        )
    batch, key_heads, _, value_dim = value.shape
    # Sums stop growing in half precision after some hundred terms, so states are float32 at least.
    dtype = torch.promote_types(value.dtype, torch.float32)
    # Without a far field there is nothing to sum: the state then has no features.
    width = phi.num_features if far else 0
    call = Call(phi, scale, is_causal, normalize, near, has_state, dtype, far_limit)
    if initial_state is not None:
        made = initial_state.near_field()
        check_same_near_field(made and made._asdict(), near and near._asdict())
        shapes = _state_shapes(key, value, width, near)
        check_state(initial_state.parts(), shapes, dtype, value.device)
        state = initial_state
    else:
        state = LinearState.empty(
            batch, key_heads, width, value_dim, device=value.device, dtype=dtype
        )
    is_known = has_state and far and not torch.compiler.is_compiling()
    made_by = Maker.of(phi, scale) if is_known else None
    if is_known:
        check_made_by("initial_state", state.made_by, made_by)
        state = replace(state, made_by=made_by)
    if key_padding_mask is not None:
        # Masked keys weigh 0, but 0 · NaN is NaN, and padding may hold anything.
        absent = ~key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
    chosen = choose_backend(backend, call, query, key, value)
    if near is not None and key.shape[2] == 0:
        # There are no tokens. The output has no rows, but stays connected to the query for
        # backward.
        out = query[..., :1].expand(*query.shape[:-1], value_dim)
        if state.near is None:
            state = replace(state, near=NearKeys.empty(key, value, near, dtype))
        return out, state if return_state else None
    # Autocast would round exponents to half precision.
    with without_autocast(query):
        # [batch, key_heads, group, length, dim]: the queries of a group share a key head.
        rows = query.unflatten(1, (key_heads, -1))
        out, last = BACKENDS[chosen].attend(call, rows, key, value, key_padding_mask, state)
    if is_known:
        last = replace(last, made_by=made_by)
    return out.flatten(1, 2).to(query.dtype), last if return_state else None


def _state_shapes(
    key: Tensor, value: Tensor, num_features: int, near: NearField | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a state's parts, by the names that `LinearState.parts` gives them."""
    batch, key_heads, _, value_dim = value.shape
    heads, dim = (batch, key_heads), key.shape[-1]
    sums = {
        "log_scale": (*heads, num_features),
        "normalizer": (*heads, num_features),
        "values": (*heads, num_features, value_dim),
    }
    if near is None:
        return sums
    return sums | {
        "near.key": (*heads, 2 * near.window_size, dim),
        "near.value": (*heads, 2 * near.window_size, value_dim),
        "near.sink_key": (*heads, near.num_sinks, dim),
        "near.sink_value": (*heads, near.num_sinks, value_dim),
        "near.heavy_key": (*heads, near.num_heavy, dim),
        "near.heavy_value": (*heads, near.num_heavy, value_dim),
        "near.heavy_weight": (*heads, near.num_heavy),
        "near.heavy_sums": (*heads, near.num_sums),
        "near.count": (batch,),
    }
