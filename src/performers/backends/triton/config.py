"""How large a tile is on the GPU, for each head dim and each precision of the matrix units.

A tile is `rows` queries or keys by `features` columns of φ. In causal attention `rows` is the
chunk: one state is kept for each in the forward pass. Larger tiles read less from memory; smaller
ones leave registers and shared memory for a larger head dim. Sizes must be powers of 2, at least
16. They were chosen by the shared memory and the registers that the compiler reports for sm_80 and
sm_90; no GPU has timed them yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["CONFIGS", "MAX_DIM", "MAX_HEADS", "OPERANDS", "Config", "Operand", "config_for"]

MAX_DIM = 256
MAX_HEADS = 65535  # batch · heads: the second and third dimension of a grid of programs


class Operand(NamedTuple):
    """What the matrix units multiply. Sums, exponents and states are float32 always."""

    dtype: torch.dtype
    precision: str  # of Triton's products of float32: "tf32" has the mantissa of float16
    is_split: bool  # whether ω is the sum of two such numbers, for it to keep its precision


# float16 is too narrow for weights and for gradients, which are sums over a sequence.
OPERANDS = {
    torch.float32: Operand(torch.float32, "tf32x3", False),
    torch.float16: Operand(torch.float32, "tf32", False),
    torch.bfloat16: Operand(torch.bfloat16, "ieee", True),
}


class Config(NamedTuple):
    rows: int
    features: int
    absorbed: int  # features per program of `absorb`, the rows of its products
    num_warps: int
    num_stages: int


# By the operand's dtype and the larger of dim and value_dim, rounded up to a power of 2.
CONFIGS = {
    (torch.bfloat16, 16): Config(64, 64, 64, num_warps=4, num_stages=2),
    (torch.bfloat16, 32): Config(64, 64, 64, num_warps=4, num_stages=2),
    (torch.bfloat16, 64): Config(64, 64, 64, num_warps=8, num_stages=2),
    (torch.bfloat16, 128): Config(64, 32, 64, num_warps=8, num_stages=2),
    (torch.bfloat16, 256): Config(64, 32, 64, num_warps=8, num_stages=1),
    (torch.float32, 16): Config(32, 32, 32, num_warps=4, num_stages=2),
    (torch.float32, 32): Config(32, 32, 32, num_warps=4, num_stages=2),
    (torch.float32, 64): Config(32, 32, 32, num_warps=8, num_stages=2),
    (torch.float32, 128): Config(32, 32, 32, num_warps=8, num_stages=1),
    (torch.float32, 256): Config(16, 16, 16, num_warps=8, num_stages=1),
}


def config_for(operand: torch.dtype, dim: int) -> Config:
    """The tile for this head dim, at most `MAX_DIM`."""
    return CONFIGS[operand, max(16, 1 << (dim - 1).bit_length())]
