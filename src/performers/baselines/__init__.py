"""The mechanisms that the paper compares with, one file each."""

from performers.baselines.big_bird import BigBirdAttention, BigBirdOptions
from performers.baselines.clustered_favor import ClusteredFavor, ClusteredFavorOptions
from performers.baselines.drawn import Drawn
from performers.baselines.identity import Identity
from performers.baselines.linformer import LinformerAttention, LinformerOptions
from performers.baselines.local import LocalAttention, LocalOptions
from performers.baselines.longformer import LongformerAttention, LongformerOptions
from performers.baselines.reformer import ReformerAttention, ReformerOptions
from performers.baselines.routing import RoutingAttention, RoutingOptions
from performers.baselines.sinkhorn import SinkhornAttention, SinkhornOptions
from performers.baselines.sparse_transformer import SparseOptions, SparseTransformerAttention
from performers.baselines.synthesizer import SynthesizerAttention, SynthesizerOptions

__all__ = [
    "BigBirdAttention",
    "BigBirdOptions",
    "ClusteredFavor",
    "ClusteredFavorOptions",
    "Drawn",
    "Identity",
    "LinformerAttention",
    "LinformerOptions",
    "LocalAttention",
    "LocalOptions",
    "LongformerAttention",
    "LongformerOptions",
    "ReformerAttention",
    "ReformerOptions",
    "RoutingAttention",
    "RoutingOptions",
    "SinkhornAttention",
    "SinkhornOptions",
    "SparseOptions",
    "SparseTransformerAttention",
    "SynthesizerAttention",
    "SynthesizerOptions",
]
