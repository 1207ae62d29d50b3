"""Modules that own parameters and buffers."""

from performers.nn.attention import FavorAttention
from performers.nn.dialect import Dialect, DialectFavor
from performers.nn.feature_maps import KernelFeatures, RandomFeatures, SoftmaxFeatures
from performers.nn.mechanisms import Exact, Favor
from performers.nn.sharp import SharpFeatures

__all__ = [
    "Dialect",
    "DialectFavor",
    "Exact",
    "Favor",
    "FavorAttention",
    "KernelFeatures",
    "RandomFeatures",
    "SharpFeatures",
    "SoftmaxFeatures",
]
