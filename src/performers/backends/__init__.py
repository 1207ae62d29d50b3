"""How a contraction is run. Every backend computes what `reference` defines."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from performers.backends import chunked, reference
from performers.checks import check_choice
from performers.typing import LinearState

__all__ = ["BACKENDS", "choose_backend"]

Backend = Callable[..., tuple[Float[Tensor, "batch key_heads group length value_dim"], LinearState]]

BACKENDS: dict[str, Backend] = {
    "reference": reference.attend,
    "chunked": chunked.attend,
}


def choose_backend(name: str | None) -> Backend:
    """The backend of that name, obeyed or refused; None chooses the fastest, which is "chunked"."""
    if name is None:
        return BACKENDS["chunked"]
    check_choice("backend", name, BACKENDS)
    return BACKENDS[name]
