"""Modules that own parameters and buffers."""

from performers.nn.attention import FavorAttention
from performers.nn.feature_maps import KernelFeatures, RandomFeatures, SoftmaxFeatures

__all__ = ["FavorAttention", "KernelFeatures", "RandomFeatures", "SoftmaxFeatures"]
