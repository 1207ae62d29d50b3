"""What attention keeps for its backward pass, and what it needs for a moment, of each mechanism.

On an accelerator, by `backend="chunked"`, with H heads and G key heads of dim d, m features, and
sequences of L tokens. Numbers that are kept per sequence:

    exact        inputs and output, H L                    a log-sum-exp per row
    kernel       inputs and output, H L, 2 G m (d + 2)     the sums before and after the keys;
                                                           causal G m (d + 2) ⌈L / 1024⌉ more, a
                                                           state per tile of keys
    near field   inputs and output, H L, 2 G m (d + 2)
    two sweeps   inputs, G m (d + 2) ⌈L / 512⌉             bidirectional, features with exponents:
                                                           a state per tile of keys
    scan         2 (H + G) L (d + 1), G m (d + 2) ⌈L / s⌉  causal, features with exponents: inputs
                                                           times √scale, [V 1], both sums, a state
                                                           per s tokens, s about m

Inputs and output are H L d of queries and outputs, and G L d of keys and of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from performers.backends import kernel_chunks, scan
from performers.backends.blocks import sizes
from performers.backends.chunked import KEY_TILE, QUERY_TILE
from performers.baselines import Identity
from performers.nn.mechanisms import Exact, Favor, HeadGroups
from performers.typing import elementwise, is_log_linear

__all__ = ["HeadsOf", "groups_of"]

WIDE = 4  # bytes of a number in float32, which sums are in


@dataclass(frozen=True)
class HeadsOf:
    """A mechanism with the heads that are its own, and the form in which it is computed."""

    mechanism: nn.Module
    form: str
    heads: int
    key_heads: int
    dim: int

    @property
    def num_features(self) -> int:
        """m; 0 of a mechanism without features."""
        phi = getattr(self.mechanism, "feature_map", None)
        return 0 if phi is None else int(phi.num_features)

    @property
    def state(self) -> int:
        """Numbers of a state: sums of values, normalizer and frame of every feature."""
        return self.key_heads * self.num_features * (self.dim + 2)

    @property
    def _segment(self) -> int:
        """Tokens between the states that a scan keeps."""
        return max(1, self.num_features // scan.CHUNK) * scan.CHUNK

    def kept(self, batch: int, length: int, width: int) -> int:
        """Bytes, where a number of inputs and output has `width` of them."""
        inputs = length * (self.heads + 2 * self.key_heads) * self.dim
        output = length * self.heads * self.dim
        rows = length * self.heads
        if self.form == "none":
            return 0
        if self.form == "exact":
            return batch * (width * (inputs + output) + WIDE * rows)
        if self.form == "two sweeps":
            return batch * (width * inputs + WIDE * -(-length // KEY_TILE) * self.state)
        if self.form == "scan":
            whole = 2 * length * (self.heads + self.key_heads) * (self.dim + 1)
            segments = -(-length // self._segment)
            return batch * WIDE * (whole + segments * self.state)
        states = 2
        if self.form == "causal kernel":
            states += -(-length // (kernel_chunks.CHUNK * kernel_chunks.CHUNKS)) - 1
        return batch * (width * (inputs + output) + WIDE * (rows + states * self.state))

    def work(self, batch: int, length: int) -> int:
        """Bytes of the tiles of a backward pass, beside gradients and what is kept."""
        m, d = self.num_features, self.dim
        if self.form in {"none", "exact"}:
            return 0
        if self.form == "near field":
            window = self.mechanism.window_size
            assert isinstance(window, int), "a near field has blocks of a size"
            group = self.heads // self.key_heads
            rows = length * (1 + group)
            blocks = -(-length // window) + sizes.SCANNED
            of_head = WIDE * (2 * d * (blocks * m + 2 * rows) + length * (m + d))
            heads = min(sizes.HEADS, batch * self.key_heads)
            whole = min(max(sizes.HEADS_BYTES, of_head), heads * of_head)
            # A tile of logits and their gradients. PyTorch's kernel has gradients of near keys in
            # the place of logits.
            is_fused = window >= sizes.FUSED_FROM["cpu"][1]
            columns = m + (d if is_fused else 3 * window)
            rows = min(group * length, max(group * window, sizes.TILE_BYTES // (WIDE * columns)))
            near = min(6 * rows // group * d, max(6 * window * d, sizes.TILE_BYTES // WIDE))
            return whole + WIDE * (2 * rows * columns + is_fused * near)
        if self.form == "scan":
            # Of each chunk of a segment K′, and S in two frames; of one chunk five tiles more.
            chunks = -(-min(length, self._segment) // scan.CHUNK)
            of_keys = self.key_heads * chunks * m * (scan.CHUNK + 2 * (d + 1))
            return batch * WIDE * (of_keys + 5 * self.heads * scan.CHUNK * m)
        if self.form == "causal kernel":
            # Of each row eight numbers of a feature (projections, features, gradients and what
            # comes of them), two of a pair and four of a value; sums before and after each chunk.
            most, chunks = kernel_chunks.sizes(length, m, torch.device("meta"))
            heads = min(batch * self.key_heads, most)
            of_row = 8 * m + 2 * kernel_chunks.CHUNK + 4 * d
            return heads * WIDE * chunks * (kernel_chunks.CHUNK * of_row + 2 * m * (d + 1))
        # A tile of features of all heads, four that come of it, and their gradient.
        return batch * WIDE * 5 * self.heads * min(length, QUERY_TILE) * m


def groups_of(
    mechanism: nn.Module, heads: int, key_heads: int, dim: int, is_causal: bool
) -> list[HeadsOf]:
    """The mechanisms of a layer.

    Raises ValueError for one that no formula here is about.
    """
    if isinstance(mechanism, HeadGroups):
        rows = zip(mechanism.mechanisms.values(), mechanism.heads, mechanism.key_heads, strict=True)
        return [HeadsOf(one, _form(one, is_causal), h, g, dim) for one, h, g in rows]
    return [HeadsOf(mechanism, _form(mechanism, is_causal), heads, key_heads, dim)]


def _form(mechanism: nn.Module, is_causal: bool) -> str:
    if isinstance(mechanism, Identity):
        return "none"
    if isinstance(mechanism, Exact):
        return "exact"
    if isinstance(mechanism, Favor):
        phi = mechanism.feature_map
        if mechanism.window_size is not None:
            return "near field"
        if elementwise(phi) is not None:
            return "causal kernel" if is_causal else "kernel"
        if not is_causal:
            return "two sweeps"
        if is_log_linear(phi):
            return "scan"
    raise ValueError(
        "a plan has formulas for exact attention, none, and FAVOR+ with features other than causal "
        f"trigonometric ones: got {type(mechanism).__name__}. Plan with one of these, and measure "
        "this one."
    )
