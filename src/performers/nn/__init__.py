"""Modules that own parameters and buffers."""

from performers.nn.attention import FavorAttention
from performers.nn.feature_maps import KernelFeatures, RandomFeatures, SoftmaxFeatures
from performers.nn.sharp import SharpFeatures

__all__ = [
    "FavorAttention",
    "KernelFeatures",
    "RandomFeatures",
    "SharpFeatures",
    "SoftmaxFeatures",
]
