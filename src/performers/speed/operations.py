"""How long a machine needs for the operations of attention alone, by the counts of `theory.cost`.

For causal attention without a near field, products inside a chunk are not counted, because a
recurrence does not need them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Operations"]

# Forward and backward in units of the forward pass. Exact attention has 2 products in the forward
# and 5 in the backward pass, which computes the weights, and so each exponential, once more.
PRODUCTS_OF_TRAINING = 3.5
EXPONENTIALS_OF_TRAINING = 2.0


@dataclass(frozen=True)
class Operations:
    """Floating-point operations in matrix products, and exponentials."""

    products: int | float
    exponentials: int | float = 0

    def times(self, count: int) -> Operations:
        return Operations(self.products * count, self.exponentials * count)

    def with_backward(self) -> Operations:
        """The operations of forward and backward together, from those of the forward pass."""
        return Operations(
            self.products * PRODUCTS_OF_TRAINING, self.exponentials * EXPONENTIALS_OF_TRAINING
        )

    def seconds(self, product_rate: float, exponential_rate: float | None) -> float:
        """The time at these operations per second; without their rate, exponentials take none."""
        seconds = self.products / product_rate
        return seconds + self.exponentials / exponential_rate if exponential_rate else seconds
