"""One attention layer in every setting of `SETTINGS`, and the alternatives to it.

    exact               torch's scaled_dot_product_attention (flash attention on a GPU)
    identity            returns V: the floor that the paper calls X

and, where they are installed,

    performer-pytorch, performer-pytorch-relu
    flash-linear-attention   its causal kernels, given plain features; on a GPU only
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from io import StringIO

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from performers.baselines import Identity
from performers.functional import favor_attention
from performers.nn import RandomFeatures, SoftmaxFeatures
from performers.speed.plan import Plan
from performers.speed.settings import KERNELS, PEER, PEER_RELU, SETTINGS

__all__ = ["Mechanism", "favor", "mechanisms", "versions"]

MODULES = {PEER: "performer_pytorch", KERNELS: "fla"}
Mechanism = Callable[..., Tensor]


def mechanisms(plan: Plan, causal: bool) -> dict[str, Callable[[], Mechanism]]:
    """What is compared, by name: each is made by a call."""
    device = torch.device(plan.device)
    table: dict[str, Callable[[], Mechanism]] = {
        "exact": lambda: partial(scaled_dot_product_attention, is_causal=causal),
        "identity": lambda: partial(Identity(), is_causal=causal),
    }
    for name in plan.settings:
        table[name] = partial(favor, plan, name, causal)
    peers = {peer for name in plan.settings for peer in SETTINGS[name].peers}
    for peer in (PEER, PEER_RELU):
        if peer in peers and _is_installed(PEER):
            table[peer] = partial(_performer_pytorch, plan, causal, peer == PEER_RELU)
    if KERNELS in peers and _is_installed(KERNELS) and causal and device.type == "cuda":
        table[KERNELS] = lambda: partial(
            _flash_linear_attention, SoftmaxFeatures(plan.dim, plan.num_projections).to(device)
        )
    return table


def favor(plan: Plan, name: str, causal: bool) -> Mechanism:
    """`favor_attention` in a setting."""
    setting = SETTINGS[name]
    return partial(
        favor_attention,
        phi=_features(plan, name, causal),
        is_causal=causal,
        window_size=setting.window_size,
        far=setting.far,
    )


def _features(plan: Plan, name: str, causal: bool) -> RandomFeatures:
    setting = SETTINGS[name]
    return setting.features(plan.layer(setting, causal))


def _performer_pytorch(plan: Plan, causal: bool, is_relu: bool) -> Mechanism:
    from performer_pytorch import FastAttention

    with redirect_stdout(StringIO()):  # it says each time that it found no CUDA code
        peer = FastAttention(
            plan.dim, plan.num_projections, causal=causal, generalized_attention=is_relu
        )
    mechanism: Mechanism = peer.to(torch.device(plan.device))
    return mechanism


def _flash_linear_attention(
    phi: SoftmaxFeatures, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Causal FAVOR+ by kernels that are given its features: [batch, length, heads, m]."""
    from fla.ops.linear_attn import chunk_linear_attn

    root = math.sqrt(phi.default_scale)
    features = phi.query_features(query.float() * root), phi.key_features(key.float() * root)
    query, key = (part.dense().to(value.dtype).transpose(1, 2) for part in features)
    out, _ = chunk_linear_attn(query, key, value.transpose(1, 2), scale=1.0, normalize=True)
    return out.transpose(1, 2)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def versions() -> dict[str, str | None]:
    """Of the other libraries; None where one is not installed."""
    return {name: metadata.version(name) if _is_installed(name) else None for name in MODULES}
