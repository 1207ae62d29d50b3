"""Attention with a near field of blocks, forward and backward by hand, a tile of blocks at a time.

A block of queries scores the keys of its own and the neighboring blocks, a few sinks, and the far
keys that `heavy` chose for it, one by one. It meets all other keys through the features, each of
which stands for all keys of one far block after another:

    keys       far: blocks … b−3, b−2  │ near: b−1, b, b+1 │  far: b+2, b+3 …   (causal: up to b)

    block c    s_cm = log Σ_{j in c} φ_m(k_j)         A_cm = Σ_{j in c} φ_m(k_j) e^(−s_cm) v_j
    far of b   s̃_bm = log Σ_{far c} e^(s_cm)          F_bm = Σ_{far c} e^(s_cm − s̃_bm) A_cm

A query then takes one softmax over a row of logits: q·k_j for what is near, log φ_m(q) + s̃_bm for
each feature m, with v_j and F_bm for their values. Far averages are made of whole blocks, by a scan
from the left and one from the right, so nothing that a causal query reads depends on a later key:
no bound on norms, no passes that depend on the data. In large blocks what is near enters the row as
one logit, the log of the sum of its weights, with its output for a value (`neighbors`).

With `far_limit`, the weights of a query's features are multiplied by min(1, limit · N / F), where
N and F are the sums of its near and of its far weights. Where the limit binds, the shares of both
are fixed, and each is a softmax of its own.

The backward pass computes features and averages again: training keeps inputs and outputs alone.
Logits are in base 2, because exp2 costs a CPU less than exp; sums of blocks are in base e.
"""

from __future__ import annotations

from performers.backends.blocks.operator import block_attention
from performers.backends.blocks.sizes import BlockAttention, Problem

__all__ = ["BlockAttention", "Problem", "block_attention"]
