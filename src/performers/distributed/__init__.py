"""Sequences that are split over processes: linear attention exchanges sums of keys, not keys.

The n-th process of a dimension of a device mesh, a *rank* of its group, holds the n-th piece of
every sequence. Pieces may differ in length.
"""

from performers.distributed.attention import sequence_parallel_attention

__all__ = ["sequence_parallel_attention"]
