"""The attention matrix that a mechanism implies, read out through one-hot values (Appendix C.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import check_tensor
from performers.functional.favor import favor_attention
from performers.typing import FeatureMap

__all__ = ["apply_matrix", "attention_matrix", "implied_matrix"]

COLUMNS_PER_BLOCK = 256


def implied_matrix(
    attend: Callable[
        [Float[Tensor, "batch key_heads key_length columns"]],
        Float[Tensor, "batch heads query_length columns"],
    ],
    key: Float[Tensor, "batch key_heads key_length dim"],
) -> Float[Tensor, "batch heads query_length key_length"]:
    """The matrix A with attend(V) = A V, for any mechanism that is linear in its values.

    Column j of A is the output for values that are 1 at key j and 0 elsewhere. Columns are read in
    blocks of 256, so beyond the matrix itself memory stays linear in the length.

    Source: Choromanski et al. 2021, Appendix C.4.
    """
    check_tensor("key", key, "batch, heads, length, dim")
    batch, key_heads, key_length, _ = key.shape
    one_hot = torch.eye(key_length, dtype=key.dtype, device=key.device)
    blocks = [
        attend(columns.expand(batch, key_heads, -1, -1))
        for columns in one_hot.split(COLUMNS_PER_BLOCK, dim=1)
    ]
    return torch.cat(blocks, dim=-1)


def apply_matrix(
    matrix: Float[Tensor, "batch heads query_length key_length"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
) -> Float[Tensor, "batch heads query_length value_dim"]:
    """A V, where heads share values as they share keys.

    For whoever asked for A: gradients reach it only where the output is made of it.
    """
    return matrix @ value.repeat_interleave(matrix.shape[1] // value.shape[1], dim=1)


def attention_matrix(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    phi: FeatureMap,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    window_size: int | None = None,
    num_sinks: int = 0,
    far: bool = True,
    far_limit: float | None = None,
    num_heavy: int = 0,
    segment_ids: Int[Tensor, "batch key_length"] | None = None,
    prefix_lengths: Int[Tensor, " batch"] | None = None,
    seen_lengths: Int[Tensor, "batch query_length"] | None = None,
) -> Float[Tensor, "batch heads query_length key_length"]:
    """The matrix that `favor_attention` with these arguments applies to its values: D⁻¹ Q′K′ᵀ.

    It is meant for looking at, not for computing with: unlike linear attention it is quadratic in
    the length.

    Cost: O(query_length · key_length) memory.  Source: Choromanski et al. 2021, Appendix C.4.
    """
    return implied_matrix(
        lambda value: favor_attention(
            query,
            key,
            value,
            phi,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            scale=scale,
            normalize=normalize,
            enable_gqa=enable_gqa,
            window_size=window_size,
            num_sinks=num_sinks,
            far=far,
            far_limit=far_limit,
            num_heavy=num_heavy,
            segment_ids=segment_ids,
            prefix_lengths=prefix_lengths,
            seen_lengths=seen_lengths,
        ),
        key,
    )
