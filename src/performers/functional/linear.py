"""The contraction of linear attention: out = D⁻¹ Q′ (K′ᵀ V), never forming the matrix Q′K′ᵀ."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends import BACKENDS, choose_backend
from performers.checks import check_attention_inputs, check_state, check_window
from performers.typing import FeatureMap, LinearState, RecentKeys

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
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> tuple[Float[Tensor, "batch heads query_length value_dim"], LinearState | None]:
    """Attention with kernel κ(q, k) = φ(√scale q)·φ(√scale k), and the state after the keys.

        bidirectional:  out_i = Σ_j κ(q_i, k_j) v_j / Σ_j κ(q_i, k_j)
        causal:         the sums run over j ≤ i

    With `window_size`, keys with |i − j| < window_size are scored by exp(scale · q·k), not κ: for
    feature maps of the softmax kernel only, and for one query per key.

    Returns the output and, with `return_state`, the state, else None.

    φ is applied tile by tile inside the backend, so features are never stored. Sums and states are
    float32 (float64 for float64 inputs), under autocast too; the output has the dtype of `query`.

    Cost: O(length · num_features · value_dim) time, O(length · (dim + value_dim)) memory.
    Source: Choromanski et al. 2021, Section 2.5.1 and Algorithm 1.
    """
    check_attention_inputs(
        query,
        key,
        value,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    if window_size is not None:
        check_window(
            window_size,
            query,
            key,
            estimates_softmax=phi.is_softmax and phi.is_nonnegative,
            is_causal=is_causal,
            has_state=initial_state is not None,
        )
    batch, key_heads, _, value_dim = value.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    if initial_state is not None:
        shapes = _state_shapes(key, value, phi.num_features, window_size if is_causal else None)
        check_state(initial_state.parts(), shapes, dtype, value.device)
        state = initial_state
    else:
        state = LinearState.empty(
            batch, key_heads, phi.num_features, value_dim, device=value.device, dtype=dtype
        )
        if window_size is not None and is_causal:
            state = replace(state, recent=RecentKeys.empty(key, value, window_size))
    if key_padding_mask is not None:
        # Masked keys weigh 0, but 0 · NaN is NaN, and padding may hold anything.
        absent = ~key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
    chosen = choose_backend(
        backend,
        query,
        key,
        value,
        phi,
        is_causal=is_causal,
        window_size=window_size,
        has_state=return_state or initial_state is not None,
    )
    with torch.autocast(query.device.type, enabled=False):
        out, last = BACKENDS[chosen](
            query.unflatten(1, (key_heads, -1)),
            key,
            value,
            phi,
            root=math.sqrt(scale),
            key_mask=key_padding_mask,
            is_causal=is_causal,
            normalize=normalize,
            window_size=window_size,
            state=state,
        )
    return out.flatten(1, 2).to(query.dtype), last if return_state else None


def _state_shapes(
    key: Tensor, value: Tensor, num_features: int, window_size: int | None
) -> dict[str, tuple[int, ...]]:
    """The shapes of a state's parts, by the names that `LinearState.parts` gives them."""
    batch, key_heads, _, value_dim = value.shape
    sums = (batch, key_heads, num_features)
    shapes = {"log_scale": sums, "normalizer": sums, "values": (*sums, value_dim)}
    if window_size is not None:
        recent = (batch, key_heads, window_size)
        shapes["recent.key"] = (*recent, key.shape[-1])
        shapes["recent.value"] = (*recent, value_dim)
        shapes["recent.visible"] = (batch, window_size)
    return shapes
