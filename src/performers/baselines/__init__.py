"""The mechanisms that the paper compares with, one file each."""

from performers.baselines.big_bird import BigBirdAttention, BigBirdOptions
from performers.baselines.drawn import Drawn
from performers.baselines.identity import Identity
from performers.baselines.local import LocalAttention, LocalOptions
from performers.baselines.longformer import LongformerAttention, LongformerOptions
from performers.baselines.sparse_transformer import SparseOptions, SparseTransformerAttention

__all__ = [
    "BigBirdAttention",
    "BigBirdOptions",
    "Drawn",
    "Identity",
    "LocalAttention",
    "LocalOptions",
    "LongformerAttention",
    "LongformerOptions",
    "SparseOptions",
    "SparseTransformerAttention",
]
