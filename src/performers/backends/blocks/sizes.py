"""What the operator is asked, and how much of it is done at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.backends.buffers import CAPABILITIES, slices

__all__ = ["LOG2_E", "BlockAttention", "Problem", "Sizes"]

LOG2_E = math.log2(math.e)
# Of the logits of a tile. Fewer calls gain more than a cache loses, but assign what suits your
# processor.
TILE_BYTES = max(2**21, 2 * CAPABILITIES.get("l2_cache_size", 0))
# By device: blocks as large as this go through PyTorch's kernel of exact attention, there and back.
FUSED_FROM = {"cpu": (128, 256)}
SCANNED = 8  # blocks of a group at most, of which sums are made at once
HEADS = 8  # that are worked on in one go; more where all weights of more fit into a tile
# Of their rows and of the averages of all their blocks, which live during a pass only. If there are
# many more, the system takes them back and gives them anew, page by page.
HEADS_BYTES = 18 * 2**20


class BlockAttention(NamedTuple):
    """Outputs, the log of their normalizers, the averages of all blocks and of the state before
    them (s̃_m and F_m), and the log of what a limit multiplied the far keys of each query by.
    """

    out: Float[Tensor, "heads group length value_dim"]
    log_sum: Float[Tensor, "heads group length 1"]
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]
    # one number for each query, none without a limit
    log_factor: Float[Tensor, "heads group length _"]


# In what follows: heads = batch · key_heads; rows = the queries of a block, group · window_size of
# them; near = the keys of 3 blocks, causal of 2.


class Problem(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    query: Float[Tensor, "heads group length dim"]
    key: Float[Tensor, "heads length dim"]
    value: Float[Tensor, "heads length value_dim"]
    # keys that no query scores one by one, or by a feature; None for none
    hidden_near: Bool[Tensor, "heads length"] | None
    hidden_far: Bool[Tensor, "heads length"] | None
    sink_key: Float[Tensor, "heads sinks dim"]
    sink_value: Float[Tensor, "heads sinks value_dim"]
    # the first query that sees each sink
    sink_start: Int[Tensor, "heads sinks"]
    # far keys that each block scores one by one, and which of them there are not
    heavy_key: Float[Tensor, "heads blocks heavy dim"]
    heavy_value: Float[Tensor, "heads blocks heavy value_dim"]
    heavy_hidden: Bool[Tensor, "heads blocks heavy"]
    # `LogLinearSide` of both, one row for all heads or one for each; no features: nothing far
    query_directions: Float[Tensor, "#heads num_features dim"]
    query_shift: Float[Tensor, "#heads 1 dim"] | None
    query_matrix: Float[Tensor, "#heads dim dim"] | None
    query_linear: Float[Tensor, "#heads 1 dim"] | None
    query_lengths: Float[Tensor, "#heads 1 dim"] | None
    query_surplus: Float[Tensor, "#heads dim few"] | None
    key_directions: Float[Tensor, "#heads num_features dim"]
    key_shift: Float[Tensor, "#heads 1 dim"] | None
    key_matrix: Float[Tensor, "#heads dim dim"] | None
    key_linear: Float[Tensor, "#heads 1 dim"] | None
    key_lengths: Float[Tensor, "#heads 1 dim"] | None
    key_surplus: Float[Tensor, "#heads dim few"] | None
    # the numbers of a feature and of both sides, together
    tilt: Float[Tensor, "#heads 1 num_features"]
    # the state before the first block
    log_mass: Float[Tensor, "heads num_features"]
    average: Float[Tensor, "heads num_features value_dim"]
    window_size: int
    scale: float
    is_causal: bool
    far_limit: float | None

    @property
    def limits(self) -> int:
        """How many numbers of a query say by how much its far keys are too many.

        Not of `Sizes`, which compare lengths and would tie an exported graph to one side.
        """
        return 0 if self.far_limit is None or self.average.shape[-2] == 0 else 1


class Sizes:
    """Sizes of a problem, and of what is done at a time, on the way there or back."""

    def __init__(self, problem: Problem, is_back: bool = False) -> None:
        self.heads, self.group, self.length, self.dim = problem.query.shape
        self.value_dim, self.features = problem.average.shape[-1], problem.average.shape[-2]
        self.block, self.sinks = min(problem.window_size, self.length), problem.sink_key.shape[1]
        self.heavy = problem.heavy_key.shape[2]
        self.count = -(-self.length // self.block)
        # Sums over blocks take so many at once, and rows that lie two apart. Whatever the length,
        # groups are the same, or a piece of a sequence would be rounded otherwise.
        self.scanned = min(self.count, SCANNED)
        self.room = -(-self.count // self.scanned) * self.scanned + 2
        self.rows = self.group * self.block
        self.before = int(self.count > 1)  # blocks that are near beside a query's own
        self.after = 0 if problem.is_causal else self.before
        self.near = (1 + self.before + self.after) * self.block
        size = problem.average.element_size()
        least = FUSED_FROM.get(problem.query.device.type)
        # Whether near keys go through PyTorch's kernel, which keeps an output in place of logits.
        self.is_fused = least is not None and self.block >= least[is_back]
        of_near = self.value_dim if self.is_fused else self.near
        columns = of_near + self.sinks + self.heavy + self.features
        # Tiles alike, so that views of buffers serve all of them.
        tile = max(1, TILE_BYTES // (self.rows * columns * size))
        self.tile = -(-self.count // -(-self.count // tile))
        # of which the gradients of near keys are made at once
        of_block = self.near * (self.dim + self.value_dim) * size
        self.span = max(1, TILE_BYTES // of_block)
        # whose rows are those of the problem, not copies
        self.is_whole = self.group == 1 and self.length == self.count * self.block
        is_copied = not self.is_whole or problem.query.dtype != problem.average.dtype
        rows = self.count * self.block * (1 + self.group * is_copied)
        both = self.dim + self.value_dim
        of_head = size * (2 * self.room * self.features * self.value_dim + rows * both)
        if is_back:  # gradients too, and products of keys
            of_head += size * rows * (both + self.features + self.dim)
        whole = TILE_BYTES // (self.count * self.rows * columns * size)
        most = HEADS_BYTES // of_head
        groups = -(-self.heads // max(1, min(max(HEADS, whole), most)))
        self.at_once = max(1, -(-self.heads // max(1, groups)))
        self.limits = problem.limits

    def head_groups(self) -> Iterator[slice]:
        return slices(self.heads, self.at_once)

    def tiles(self) -> Iterator[slice]:
        return slices(self.count, self.tile)
