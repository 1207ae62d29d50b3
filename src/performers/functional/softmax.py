"""Exact softmax attention, the mechanism that FAVOR+ estimates."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performers.checks import check_attention_inputs
from performers.functional.autocast import autocast_inputs
from performers.functional.segments import attend_by_segment
from performers.functional.staircase import check_staircase, prefix_seen

__all__ = ["softmax_attention"]


def softmax_attention(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    segment_ids: Int[Tensor, "batch key_length"] | None = None,
    prefix_lengths: Int[Tensor, " batch"] | None = None,
    seen_lengths: Int[Tensor, "batch query_length"] | None = None,
) -> Float[Tensor, "batch heads query_length value_dim"]:
    """softmax(scale · QKᵀ) V with the masks of `favor_attention`; 0 for a query that sees no key.

    `scale` is 1/√dim unless given. Cost with `segment_ids`: the squares of their lengths.
    Cost: O(query_length · key_length · dim).  Source: Choromanski et al. 2021, Eq. 1 and 2.
    """
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
    if prefix_lengths is not None or seen_lengths is not None:
        check_staircase(
            seen_lengths, prefix_lengths, query, key, is_causal=is_causal, segment_ids=segment_ids
        )
    if segment_ids is not None:
        attend = partial(softmax_attention, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        return attend_by_segment(attend, segment_ids, query, key, value, key_padding_mask)
    if prefix_lengths is not None:
        is_causal, seen_lengths = False, prefix_seen(prefix_lengths, key.shape[2])
    if key_padding_mask is None and seen_lengths is None:
        return scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    visible = torch.ones_like(query[:, :1, :, :1], dtype=torch.bool)
    if key_padding_mask is not None:
        absent = ~key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(absent, 0.0), value.masked_fill(absent, 0.0)
        visible = visible & key_padding_mask[:, None, None, :]
    if seen_lengths is not None:
        position = torch.arange(key.shape[2], device=key.device)
        visible = visible & (position < seen_lengths[:, None, :, None])
    if is_causal:
        visible = visible.tril()
    sees_a_key = visible.any(dim=-1, keepdim=True)
    # A query that sees no key would get 0/0: let it see every key, and set its output to 0 below.
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=visible | ~sees_a_key, scale=scale, enable_gqa=enable_gqa
    )
    return torch.where(sees_a_key, out, 0.0)
