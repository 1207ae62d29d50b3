"""Feature maps, backends and inputs that the tests of attention share.

Maps and backends are those of the registries: a new row is under every law from its first day.
"""

import functools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from performers.backends import BACKENDS, Call, choose_backend
from performers.functional import KERNELS
from performers.nn import KernelFeatures, RandomFeatures, SharpFeatures, SoftmaxFeatures
from performers.nn.estimators import ESTIMATORS
from performers.state import NearField


def calibrated(dim: int, num_projections: int) -> SharpFeatures:
    """Sharp features, the same for all heads, that have learned where some skew vectors lie."""
    phi = SharpFeatures(dim, num_projections)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 50, dim, generator=generator)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    phi.calibrate(query * torch.linspace(0.3, 1.5, dim) + 0.3, key @ mixing - 0.2)
    return phi


# Every kind of `Features`, for a dim and a number of projections.
FEATURE_MAPS: dict[str, Callable[[int, int], RandomFeatures]] = {
    **{name: lambda dim, m, e=name: SoftmaxFeatures(dim, m, estimator=e) for name in ESTIMATORS},
    **{name: lambda dim, m, fn=name: KernelFeatures(dim, m, fn) for name in KERNELS},
    "sharp": calibrated,
    "exp without epsilon": lambda dim, m: KernelFeatures(dim, m, "exp", epsilon=0.0),
    "elu+1 without omega": lambda dim, m: KernelFeatures(dim, fn="elu+1", projection=None),
}
NONNEGATIVE = [name for name, build in FEATURE_MAPS.items() if build(2, 2).is_nonnegative]


@functools.cache
def backends(
    name: str = "positive",
    is_causal: bool = False,
    has_state: bool = False,
    has_near_field: bool = False,
) -> tuple[str | None, ...]:
    """Who computes such a call with that feature map: None, for whoever is chosen, and by name
    every backend that serves the call and was not chosen, which would be the same again.

    Triton's kernels are left to tests/backends, at sizes that their interpreter can bear.
    """
    phi, x = FEATURE_MAPS[name](5, 3), torch.zeros(1, 1, 2, 5)
    near = NearField(window_size=1) if has_near_field else None
    call = Call(phi, 1.0, is_causal, True, near, has_state, dtype=torch.float32)
    chosen = choose_backend(None, call, x, x, x)
    served: list[str | None] = [None]
    for backend in BACKENDS:
        if backend not in ("triton", chosen):
            try:
                served.append(choose_backend(backend, call, x, x, x))
            except ValueError:  # it refuses, in words that tests/functional/test_errors.py reads
                continue
    return tuple(served)


def every_call_of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Each of these maps, bidirectional and causal, with each of its `backends`."""
    return pytest.mark.parametrize(
        ("name", "is_causal", "backend"),
        [
            (name, is_causal, backend)
            for name in names
            for is_causal in (False, True)
            for backend in backends(name, is_causal)
        ],
    )


def every_call_with_maps_of(names: Iterable[str]) -> pytest.MarkDecorator:
    """The same where a case is short, and goes through all maps of its backend: `maps_of`."""
    return pytest.mark.parametrize(
        ("is_causal", "backend", "names"),
        [
            pytest.param(is_causal, backend, served, id=f"{is_causal}-{backend}")
            for is_causal in (False, True)
            for backend in (None, *BACKENDS)
            if (served := [name for name in names if backend in backends(name, is_causal)])
        ],
    )


# Norms along the sequence: what the entries of queries and keys are multiplied by.
NORMS: dict[str, Callable[[int], Tensor]] = {
    "1": lambda length: torch.full((length,), 1.0),
    "10": lambda length: torch.full((length,), 10.0),
    "1e4": lambda length: torch.full((length,), 1e4),
    "growing": lambda length: torch.logspace(-1, 4, length),
    "shrinking": lambda length: torch.logspace(4, -1, length),
    "tiny then huge": lambda length: torch.where(torch.arange(length) < length // 2, 1.0, 1e3),
    "huge then tiny": lambda length: torch.where(torch.arange(length) < length // 2, 1e3, 1.0),
    "alternating": lambda length: torch.where(torch.arange(length) % 2 == 0, 1e3, 1.0),
    "one huge key": lambda length: torch.where(torch.arange(length) == length // 2, 1e4, 1.0),
}

# Key padding masks, (2, length): True = a real key.
MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "no mask": lambda length: None,
    "left": lambda length: torch.arange(length) >= torch.tensor([[length // 3], [0]]),
    "right": lambda length: torch.arange(length) < torch.tensor([[length // 3], [length]]),
    "holes": lambda length: torch.arange(length) % torch.tensor([[2], [3]]) == 1,
    "full": lambda length: torch.arange(length) < torch.tensor([[0], [length]]),
}


def inputs(
    length: int = 23,
    key_length: int | None = None,
    *,
    batch: int = 2,
    heads: int = 6,
    key_heads: int = 3,
    dim: int = 5,
    value_dim: int = 7,
    dtype: torch.dtype = torch.float32,
    norms: str = "1",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian query, key, value; queries and keys times the norms of that name.

    Three key heads with two query heads each: pass `enable_gqa=True`, or `key_heads=6`.
    """
    key_length = length if key_length is None else key_length
    query = torch.randn(batch, heads, length, dim) * NORMS[norms](length)[:, None]
    key = torch.randn(batch, key_heads, key_length, dim) * NORMS[norms](key_length)[:, None]
    value = torch.randn(batch, key_heads, key_length, value_dim)
    return query.to(dtype), key.to(dtype), value.to(dtype)
