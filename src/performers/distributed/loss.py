"""The loss of a piece of a sequence, which adds up to that of the whole."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["next_tokens", "summed_loss"]

IGNORED = -100


def next_tokens(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """What each position predicts: the label after it, which may be in another piece."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def summed_loss(
    logits: Float[Tensor, "batch length vocabulary"], targets: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Σ cross-entropy over targets other than −100, in float32 at least: a sum of many losses in
    half precision would stop growing.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
