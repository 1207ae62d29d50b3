"""What a near field asks of the arguments of attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from performers.checks import check_count, check_number

__all__ = [
    "check_far_limit",
    "check_near_field",
    "check_near_keys",
    "check_num_heavy",
    "check_same_near_field",
]

# Of the keys and values that a state keeps, which are allocated ahead.
MOST_NEAR_BYTES = 16 * 2**30


def check_far_limit(far_limit: float | None, far: bool | None) -> None:
    """Raise unless a limit on far keys is a positive number, and there are far keys."""
    if far_limit is None:
        return
    meaning = (
        "It is what all far keys of a query weigh at most when its near ones weigh 1, such as 0.2; "
        "None sets no limit, and far=False leaves far keys out."
    )
    check_number("far_limit", far_limit, otherwise=meaning)
    if far is False:
        raise ValueError(
            f"far_limit={far_limit} limits the far keys, and far=False leaves them out. Pass one "
            "of them."
        )


def check_num_heavy(num_heavy: int, far: bool | None) -> None:
    """Raise unless heavy keys are a number of far keys, and no estimate counts them again."""
    check_count("num_heavy", num_heavy, least=0)
    if num_heavy and far is not False:
        raise ValueError(
            f"num_heavy={num_heavy} far keys are scored exactly, and the estimate of the far keys "
            "would count them again: pass far=False with it, or num_heavy=0."
        )


def check_near_field(
    window_size: int | None,
    num_sinks: int,
    far: bool,
    far_limit: float | None,
    num_heavy: int,
    query: Tensor,
    key: Tensor,
    *,
    estimates_softmax: bool,
    is_causal: bool,
    has_state: bool,
) -> None:
    """Raise unless an exact near field is possible with these arguments."""
    check_count("num_sinks", num_sinks, least=0)
    check_far_limit(far_limit, far)
    check_num_heavy(num_heavy, far)
    if window_size is None:
        if num_sinks or not far or far_limit is not None:
            given = f"num_sinks={num_sinks}" if num_sinks else "far=False"
            given = given if far_limit is None else f"far_limit={far_limit!r}"
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
    if num_heavy and torch.compiler.is_exporting() and not isinstance(key.shape[2], int):
        raise ValueError(
            f"num_heavy={num_heavy} compares the blocks of a sequence one by one, so an exported "
            "graph must have one length, and this one has a dynamic length. Export it with a fixed "
            "length, or pass num_heavy=0."
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
