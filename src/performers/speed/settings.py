"""The settings of attention that the documents recommend: what each is, and what it must compute.

A new setting is a row of `SETTINGS`. The benchmark, its tables and its figure follow from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from performers.nn import KernelFeatures, RandomFeatures, SharpFeatures, SoftmaxFeatures
from performers.speed.operations import Operations
from performers.theory.cost import favor_operations, near_pairs

__all__ = ["KERNELS", "PEER", "PEER_RELU", "SETTINGS", "Layer", "Setting"]

KERNELS = "flash-linear-attention"
PEER = "performer-pytorch"
PEER_RELU = "performer-pytorch-relu"


class Layer(NamedTuple):
    """The attention layer that features are made for."""

    dim: int
    num_projections: int
    heads: int
    is_causal: bool
    device: torch.device


@dataclass(frozen=True)
class Setting:
    """A kind of features, with or without a near field.

    `peers`: mechanisms of other libraries that estimate the same kernel.
    `num_projections`: fixed by the setting, or None for those of the benchmark's plan.
    `is_exponential`: features are exponentials. `is_mapped`: queries and keys are multiplied by a
    matrix before the product with ω. `far`: whether keys beyond the near field are estimated.
    """

    features: Callable[[Layer], RandomFeatures]
    peers: tuple[str, ...]
    num_projections: int | None = None
    window_size: int | None = None
    is_exponential: bool = True
    is_mapped: bool = False
    far: bool = True

    def operations(self, layer: Layer, length: int) -> Operations:
        """Those of the forward pass of one head."""
        num_projections = layer.num_projections if self.far else 0
        products = favor_operations(
            length,
            layer.dim,
            num_projections,
            self.window_size,
            is_causal=layer.is_causal,
            is_sharp=self.is_mapped,
        )
        exponentials = 2 * length * num_projections if self.is_exponential else 0
        if self.window_size is not None:
            exponentials += near_pairs(length, self.window_size, layer.is_causal)
        return Operations(products, exponentials)


def _plain(layer: Layer) -> RandomFeatures:
    return SoftmaxFeatures(layer.dim, layer.num_projections).to(layer.device)


def _relu(layer: Layer) -> RandomFeatures:
    return KernelFeatures(layer.dim, layer.num_projections).to(layer.device)


def _sharp(layer: Layer) -> RandomFeatures:
    """Sharp features with the statistics of the call, or calibrated ones for causal attention,
    which cannot use the former.
    """
    if layer.is_causal:
        return _calibrated(layer, query_ratio=2.0)
    phi = SharpFeatures(
        layer.dim, layer.num_projections, layer.heads, statistics="call", query_ratio=2.0
    )
    return phi.to(layer.device)


def _calibrated(layer: Layer, query_ratio: float = 1.0) -> RandomFeatures:
    """Sharp features that were calibrated on inputs like those of the benchmark. The cost of a call
    does not depend on what was learned.
    """
    phi = SharpFeatures(layer.dim, layer.num_projections, layer.heads, query_ratio=query_ratio)
    phi = phi.to(layer.device)
    query, key = torch.randn(2, 1, layer.heads, 256, layer.dim, device=layer.device).unbind()
    phi.calibrate(query, key)
    return phi


SETTINGS = {
    "plain": Setting(_plain, (PEER, KERNELS)),
    "relu": Setting(_relu, (PEER_RELU,), is_exponential=False),
    "sharp": Setting(_sharp, (PEER,), is_mapped=True),
    "near-field": Setting(_calibrated, (PEER,), num_projections=64, window_size=64, is_mapped=True),
    "near-field-wide": Setting(
        _calibrated, (PEER,), num_projections=64, window_size=128, is_mapped=True
    ),
    "near-alone": Setting(_plain, (PEER,), num_projections=1, window_size=128, far=False),
}
