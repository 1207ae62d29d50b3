"""Modules that own parameters and buffers."""

from performers.nn.attention import FavorAttention
from performers.nn.diagnosis import Diagnosis, HeadDiagnosis, diagnose
from performers.nn.feature_maps import KernelFeatures, RandomFeatures, SoftmaxFeatures
from performers.nn.mechanisms import Exact, Favor
from performers.nn.sharp import SharpFeatures

__all__ = [
    "Diagnosis",
    "Exact",
    "Favor",
    "FavorAttention",
    "HeadDiagnosis",
    "KernelFeatures",
    "RandomFeatures",
    "SharpFeatures",
    "SoftmaxFeatures",
    "diagnose",
]
