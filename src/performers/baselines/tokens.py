"""What mechanisms that know positions share: the real tokens of self-attention, side by side."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.slots import Slots
from performers.checks import check_attention_inputs
from performers.functional.autocast import autocast_inputs
from performers.state import NearField

__all__ = ["check_bidirectional", "real_tokens", "rows_of_tokens"]


def real_tokens(
    mechanism: str,
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    *,
    is_causal: bool,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None,
) -> Slots:
    """Queries, keys and values of the real tokens in front, and zeros behind them.

    The position of a token is the number of real tokens before it, so that padding, wherever it
    stands, changes nothing. `rows_of_tokens` leads back.

    Raises ValueError or TypeError for inputs that do not fit each other, and for cross-attention,
    in which positions of keys are none of queries.
    """
    query, key, value = autocast_inputs(query, key, value)
    check_attention_inputs(
        query,
        key,
        value,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        enable_gqa=True,
        scale=None,
    )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{mechanism} needs one query per key: query length is {query.shape[2]}, key length is "
            f"{key.shape[2]}. It has no form for cross-attention."
        )
    grouped = query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1]))
    slots = Slots.of(NearField(window_size=1), grouped, key, value, key_padding_mask, None)
    if slots.is_real is None:
        return slots
    absent = ~slots.is_real[:, None, :, None]
    return replace(
        slots,
        query=slots.query.masked_fill(absent.unsqueeze(1), 0.0),
        key=slots.key.masked_fill(absent, 0.0),
        value=slots.value.masked_fill(absent, 0.0),
    )


def rows_of_tokens(
    slots: Slots, rows: Float[Tensor, "batch key_heads group slots value_dim"]
) -> Float[Tensor, "batch heads length value_dim"]:
    """The output of attention from its rows in slots, in the dtype of values; 0 for padding."""
    return slots.tokens(rows).flatten(1, 2).to(slots.value.dtype)


def check_bidirectional(mechanism: str, is_causal: bool, reason: str) -> None:
    """Raise ValueError for a causal call of a mechanism that has no causal form."""
    if is_causal:
        raise ValueError(
            f"{mechanism} has no causal form: {reason}. Pass is_causal=False, or take another "
            "mechanism."
        )
