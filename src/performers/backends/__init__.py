"""How a contraction is run. Every backend computes what `reference` defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from performers.backends import chunked, landmarks, reference, triton
from performers.checks import check_choice
from performers.typing import FeatureMap, NearField

__all__ = ["BACKENDS", "choose_backend", "refusals"]

BACKENDS: dict[str, Callable[..., Any]] = {
    "reference": reference.attend,
    "chunked": chunked.attend,
    "landmarks": landmarks.attend,
    "triton": triton.attend,
}


def choose_backend(
    name: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    *,
    is_causal: bool,
    near: NearField | None,
    has_state: bool,
) -> str:
    """The backend for a call: the named one, obeyed or refused; for None, the fastest proven one.

    That is "landmarks" on a CPU where it applies, and "chunked" everywhere else. "triton" must be
    named: its kernels agree with the reference in Triton's interpreter, but no GPU has run them.
    """
    reasons = refusals(
        query,
        key,
        value,
        phi,
        is_causal=is_causal,
        near=near,
        has_state=has_state,
    )
    if name is None:
        return "chunked" if reasons["landmarks"] else "landmarks"
    check_choice("backend", name, BACKENDS)
    if reasons.get(name):
        raise ValueError(
            f'backend="{name}" cannot serve this call: {reasons[name]}. Pass backend=None to let '
            'the library choose, or "chunked", which serves every call.'
        )
    return name


def refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    *,
    is_causal: bool,
    near: NearField | None,
    has_state: bool,
) -> dict[str, str | None]:
    """Why each backend that does not serve every call cannot serve this one; None if it can."""
    return {
        "landmarks": landmarks.refusal(
            query, key, phi, is_causal=is_causal, near=near, has_state=has_state
        ),
        "triton": triton.refusal(query, key, value, phi, near=near),
    }
