"""How a contraction is run. Every backend computes what `reference` defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from performers.backends import chunked, landmarks, reference
from performers.checks import check_choice
from performers.typing import FeatureMap

__all__ = ["BACKENDS", "choose_backend"]

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.attend,
    "chunked": chunked.attend,
    "landmarks": landmarks.attend,
}


def choose_backend(
    name: str | None,
    query: Tensor,
    key: Tensor,
    phi: FeatureMap,
    *,
    is_causal: bool,
    window_size: int | None,
    has_state: bool,
) -> str:
    """The backend for a call: the named one, obeyed or refused; for None, the fastest that can.

    That is "landmarks" where it applies and "chunked" everywhere else.
    """
    reason = landmarks.refusal(
        query, key, phi, is_causal=is_causal, window_size=window_size, has_state=has_state
    )
    if name is None:
        return "chunked" if reason else "landmarks"
    check_choice("backend", name, BACKENDS)
    if name == "landmarks" and reason:
        raise ValueError(
            f'backend="landmarks" cannot serve this call: {reason}. Pass backend=None to let the '
            "library choose."
        )
    return name
