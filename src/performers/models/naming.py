"""The name of a cache in transformers: `past_key_values` up to 5.23, `cache` from 5.24 on.

Our models take both with any of these versions, so a program may say either. Where they speak to
transformers, they say what the installed version says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from transformers.modeling_outputs import BaseModelOutputWithPast

__all__ = ["CACHE", "CACHE_NAMES", "cache_among", "cache_by_either_name"]

CallableT = TypeVar("CallableT", bound=Callable[..., Any])

OLDER, NEWER = CACHE_NAMES = ("past_key_values", "cache")

# Of the argument in models' calls, and of the entry in what they return.
CACHE = NEWER if NEWER in BaseModelOutputWithPast.__dataclass_fields__ else OLDER


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by whichever name, or None.

    Raises ValueError for two of them.
    """
    older, newer = arguments.get(OLDER), arguments.get(NEWER)
    if older is not None and newer is not None:
        raise ValueError(
            "cache and past_key_values are two names of one argument: got both. Pass one of them."
        )
    return newer if older is None else older


def cache_by_either_name(forward: CallableT) -> CallableT:
    """A `forward` that takes `past_key_values`, and takes it as `cache` too."""

    @wraps(forward)
    def taking_both(*args: Any, **options: Any) -> Any:
        if NEWER in options:
            options[OLDER] = cache_among(options)
            del options[NEWER]
        return forward(*args, **options)

    return cast(CallableT, taking_both)
