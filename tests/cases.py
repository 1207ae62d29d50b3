"""Feature maps and inputs that the tests of attention share."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from performers.functional import KERNELS
from performers.nn import KernelFeatures, RandomFeatures, SoftmaxFeatures
from performers.nn.estimators import ESTIMATORS

# Every kind of `Features`, for a dim and a number of projections.
FEATURE_MAPS: dict[str, Callable[[int, int], RandomFeatures]] = {
    **{name: lambda dim, m, e=name: SoftmaxFeatures(dim, m, estimator=e) for name in ESTIMATORS},
    **{name: lambda dim, m, fn=name: KernelFeatures(dim, m, fn) for name in KERNELS},
    "exp without epsilon": lambda dim, m: KernelFeatures(dim, m, "exp", epsilon=0.0),
    "elu+1 without omega": lambda dim, m: KernelFeatures(dim, fn="elu+1", projection=None),
}
NONNEGATIVE = [name for name, build in FEATURE_MAPS.items() if build(2, 2).is_nonnegative]

# Who computes it. None chooses: for bidirectional attention with positive features the landmarks
# backend, which takes no other call; everywhere else the chunked one.
BACKENDS = ("reference", "chunked")
every_call = pytest.mark.parametrize(
    ("backend", "is_causal"),
    [*itertools.product((*BACKENDS, None), [False]), *itertools.product(BACKENDS, [True])],
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
