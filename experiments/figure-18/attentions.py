"""The attention of the Linear Transformer, φ(x) = elu(x) + 1, as different programs compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.functional import KERNELS, favor_attention
from performers.nn import KernelFeatures
from performers.typing import FeatureMap

# That of the published code, added to each normalizer.
EPSILON = 1e-6


def as_published(x: Tensor) -> Tensor:
    """φ as it is usually written. In float32 it has lost its digits at -8, and is 0 below -17."""
    return F.elu(x) + 1


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap | None = None,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    *,
    features: Callable[[Tensor], Tensor] = as_published,
    sums: torch.dtype = torch.float32,
    epsilon: float = EPSILON,
    **options: Any,
) -> Tensor:
    """out_i = φ(q_i)·S_i / (φ(q_i)·z_i + ε), with φ = `features`, not `phi`, and all of φ, S and z
    rounded to `sums`.

        S_i = Σ_{j≤i} φ(k_j) v_jᵀ,    z_i = Σ_{j≤i} φ(k_j)

    Windows have no padding, so no mask is expected.
    """
    assert key_padding_mask is None, "windows of whole proteins have no padding"
    q, k = features(query), features(key)
    outer = k.unsqueeze(-1) * F.pad(value, (0, 1), value=1.0).unsqueeze(-2)
    totals = outer.cumsum(-3) if is_causal else outer.sum(-3, keepdim=True)
    q, totals = (x.to(sums).to(query.dtype) for x in (q, totals))
    out = (q.unsqueeze(-2) @ totals).squeeze(-2)
    return out[..., :-1] / (out[..., -1:] + epsilon)


# By name: what takes the place of `favor_attention` in a model.
ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "Linear Transformer": favor_attention,
    "as published": attend,
    "as published, sums in bfloat16": partial(attend, sums=torch.bfloat16),
    "no normalizer": partial(favor_attention, normalize=False),
}


def errors_of_output(shifts: Sequence[float], seed: int) -> dict[str, list[float]]:
    """Relative errors of causal attention in float32, against float64, where all queries lie
    `shift` below 0, so that their features are about as small as exp(-shift).
    """
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, 2, 128, 16, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    phi = KernelFeatures(16, fn="elu+1", epsilon=0.0, projection=None)
    true = KERNELS["elu+1"].fn
    found: dict[str, list[float]] = {}
    for name, attention in ATTENTIONS.items():
        if name == "no normalizer":  # another function, and not an error of this one
            continue
        found[name] = []
        for shift in shifts:
            inputs = (query - shift, key, value)
            wanted = attend(*inputs, is_causal=True, features=true, sums=torch.float64, epsilon=0.0)
            single = (x.float() for x in inputs)
            difference = attention(*single, phi, is_causal=True).double() - wanted
            found[name].append(float(difference.norm() / wanted.norm()))
    return found
