"""How a contraction is run. Every backend computes what `reference` defines."""

from __future__ import annotations

from torch import Tensor

from performers.backends import chunked, landmarks, reference, triton
from performers.backends.call import Backend, Call
from performers.checks import check_choice

__all__ = ["BACKENDS", "Backend", "Call", "choose_backend", "refusals"]


def _never(call: Call, query: Tensor, key: Tensor, value: Tensor) -> None:
    """The refusal of a backend that serves every call."""


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference.attend, _never),
    "chunked": Backend(chunked.attend, _never),
    "landmarks": Backend(landmarks.attend, landmarks.refusal),
    "triton": Backend(triton.attend, triton.refusal),
}


def choose_backend(name: str | None, call: Call, query: Tensor, key: Tensor, value: Tensor) -> str:
    """The backend for a call: the named one, obeyed or refused; for None, the fastest proven one.

    That is "triton" on GPUs on which its tests have run, "landmarks" on a CPU, and "chunked" on
    other devices and for what these refuse.
    """
    if name is None:
        fastest = "triton" if triton.is_proven(query.device) else "landmarks"
        reason = BACKENDS[fastest].refusal(call, query, key, value)
        return fastest if reason is None else "chunked"
    check_choice("backend", name, BACKENDS)
    reason = BACKENDS[name].refusal(call, query, key, value)
    if reason is not None:
        raise ValueError(
            f'backend="{name}" cannot serve this call: {reason}. Pass backend=None to let the '
            'library choose, or "chunked", which serves every call.'
        )
    return name


def refusals(call: Call, query: Tensor, key: Tensor, value: Tensor) -> dict[str, str]:
    """Why those backends that cannot serve a call cannot."""
    reasons = {name: row.refusal(call, query, key, value) for name, row in BACKENDS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}
