"""How large a tile is on the GPU, for each head dim and each precision of the matrix units.

A tile is `rows` queries or keys by `features` columns of φ. In causal attention `rows` is the
chunk: one state is kept for each in a pass. Larger tiles read less from memory; smaller ones leave
registers and shared memory for a larger head dim. Sizes must be powers of 2, at least 16. For
bfloat16 and head dim 64 they were timed on an H200 (`benchmarks/triton-tiles.json`); the others
follow these, and the shared memory that the compiler reports for sm_80 and sm_90.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "CONFIGS",
    "MAX_DIM",
    "MAX_HEADS",
    "OPERANDS",
    "Config",
    "Operand",
    "Tile",
    "cdiv",
    "config_for",
    "halves",
    "width",
]

MAX_DIM = 256
MAX_HEADS = 65535  # batch · heads: the second and third dimension of a grid of programs


class Operand(NamedTuple):
    """What the matrix units multiply. Sums, exponents and states are float32 always."""

    dtype: torch.dtype
    precision: str  # of Triton's products of float32: one "tf32" loses half a bit of float16
    is_split: bool  # whether ω is the sum of two such numbers, for it to keep its precision


# float16 is too narrow for weights and for gradients, which are sums over a sequence.
OPERANDS = {
    torch.float32: Operand(torch.float32, "tf32x3", False),
    torch.float16: Operand(torch.float32, "tf32x3", False),
    torch.bfloat16: Operand(torch.bfloat16, "ieee", True),
}


class Tile(NamedTuple):
    """How a kernel goes over features: so many at a time, by so many warps."""

    features: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """Rows of a tile, and the tile of each kernel.

    `near_read` and the like are the kernels of near fields, whose rows are at most a block.
    """

    rows: int
    absorb: Tile
    read: Tile
    query_gradient: Tile
    key_gradient: Tile
    near_read: Tile
    near_query_gradient: Tile
    near_key_gradient: Tile

    @classmethod
    def of(cls, rows: int, features: int, num_warps: int, num_stages: int, **own: Tile) -> Config:
        """The same tile for all kernels but those that have their own."""
        tile = Tile(features, num_warps, num_stages)
        return cls(rows, **(dict.fromkeys(cls._fields[1:], tile) | own))


# By the operand's dtype and the larger of dim and value_dim, rounded up to a power of 2. With fewer
# features than rows, in bfloat16, Triton 3.6 makes wrong code for the gradients on sm_90.
CONFIGS = {
    (torch.bfloat16, 16): Config.of(64, 64, num_warps=4, num_stages=1),
    (torch.bfloat16, 32): Config.of(64, 64, num_warps=4, num_stages=1),
    (torch.bfloat16, 64): Config.of(64, 64, num_warps=4, num_stages=1),
    (torch.bfloat16, 128): Config.of(64, 64, num_warps=8, num_stages=1),
    (torch.bfloat16, 256): Config.of(64, 64, num_warps=8, num_stages=1),
    (torch.float32, 16): Config.of(32, 32, num_warps=4, num_stages=1),
    (torch.float32, 32): Config.of(32, 32, num_warps=4, num_stages=1),
    (torch.float32, 64): Config.of(32, 32, num_warps=8, num_stages=1),
    (torch.float32, 128): Config.of(32, 32, num_warps=8, num_stages=1),
    (torch.float32, 256): Config.of(16, 16, num_warps=8, num_stages=1),
}


def config_for(operand: torch.dtype, dim: int) -> Config:
    """The tiles for this head dim, at most `MAX_DIM`."""
    return CONFIGS[operand, width(dim)]


def width(dim: int) -> int:
    """The columns of a tile of vectors: the next power of 2, at least 16."""
    return max(16, 1 << (dim - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # Triton's own costs ten times as much outside of kernels


def halves(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A number as the matrix units take it, and what is left of it."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
