"""Operators whose backward pass is written by hand have a first derivative and no second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(what: str, backend: str = "reference") -> Callable[..., Any]:
    """For the backward operator of `what`, in place of a derivative of its own."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{what} has a first derivative only. For second derivatives pass "
            f'backend="{backend}" to the attention call.'
        )

    return refuse
