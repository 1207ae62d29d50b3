"""The operations that attention cannot do without, and how long a machine needs for them alone.

Counted are matrix products and exponentials of one head. Left out is what the count would owe to
a way of computing it: of causal attention without a near field the products inside a chunk, which
a recurrence has not, and of a near field the sums of blocks, 2·m·d/w per token or twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Operations", "estimated", "mapped", "near_pairs", "pairs", "scored"]

# Forward and backward in units of the forward pass. Exact attention has 2 products in the forward
# and 5 in the backward pass, which computes the weights, and so each exponential, once more.
PRODUCTS_OF_TRAINING = 3.5
EXPONENTIALS_OF_TRAINING = 2.0


@dataclass(frozen=True)
class Operations:
    """Floating-point operations in matrix products, and exponentials."""

    products: int | float
    exponentials: int | float = 0

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.exponentials + other.exponentials)

    def times(self, count: int) -> Operations:
        return Operations(self.products * count, self.exponentials * count)

    def with_backward(self) -> Operations:
        """Of the forward and the backward pass, where these are those of the forward pass."""
        return Operations(
            self.products * PRODUCTS_OF_TRAINING, self.exponentials * EXPONENTIALS_OF_TRAINING
        )

    def seconds(self, product_rate: float, exponential_rate: float | None) -> float:
        """At so many operations per second. None: exponentials do not count."""
        seconds = self.products / product_rate
        return seconds + self.exponentials / exponential_rate if exponential_rate else seconds


def estimated(length: int, num_projections: int, dim: int, *, is_exponential: bool) -> Operations:
    """Attention by features: φ of queries and of keys, K′ᵀV, and Q′ times that.

    Each of the four products has 2·m·d operations per token.
    """
    features = 2 * length * num_projections
    return Operations(4 * features * dim, features if is_exponential else 0)


def mapped(length: int, dim: int) -> Operations:
    """A square matrix that queries, and one that keys go through: 2·d² operations each."""
    return Operations(4 * length * dim**2)


def scored(count: int, dim: int) -> Operations:
    """So many pairs of a query and a key: a score, an exponential, and the share of a value."""
    return Operations(4 * count * dim, count)


def pairs(length: int, *, is_causal: bool) -> int:
    """The pairs of a query and a key that exact attention scores."""
    return length * (length + 1) // 2 if is_causal else length**2


def near_pairs(length: int, window_size: int, *, is_causal: bool) -> int:
    """The pairs that a near field scores: per query about 3w keys, causal 1.5w.

    See `performers.typing.NearField`.
    """
    blocks = [min(window_size, length - start) for start in range(0, length, window_size)]
    neighbors = sum(left * right for left, right in pairwise(blocks))
    own = sum(pairs(size, is_causal=is_causal) for size in blocks)
    return own + (neighbors if is_causal else 2 * neighbors)
