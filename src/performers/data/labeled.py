"""Sequences with a label each, or pairs of them: what a classifier reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from performers.checks import check_count

__all__ = ["PADDING", "LabeledSequences", "byte_rows"]

# No token of a text has this number, nor has any symbol of an expression.
PADDING = 0


@dataclass(frozen=True, eq=False)
class LabeledSequences:
    """Sequences of one length, filled up with `PADDING`, or pairs of these, a byte per token."""

    tokens: UInt8[Tensor, "sequences *pair length"]
    labels: Int64[Tensor, " sequences"]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels):
            raise ValueError(
                f"there must be a label for each sequence: got {len(self.labels)} for "
                f"{len(self.tokens)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def most_frequent_share(self) -> float:
        """The share of the most frequent label: what is right without reading anything."""
        return float(self.labels.bincount().max()) / len(self)


def byte_rows(rows: Sequence[bytes], length: int) -> UInt8[Tensor, "rows length"]:
    """The first `length` bytes of each row, filled up with `PADDING`. NUL is read as a space.

    >>> byte_rows([b"ab", bytes([0, 99, 100, 101])], 3).tolist()
    [[97, 98, 0], [32, 99, 100]]
    """
    check_count("length", length)
    packed = b"".join(
        row[:length].replace(b"\0", b" ").ljust(length, bytes([PADDING])) for row in rows
    )
    return torch.from_numpy(np.frombuffer(packed, np.uint8).reshape(-1, length).copy())
