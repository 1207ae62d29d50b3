"""Losses of a class for each token: of whole sequences, and of pieces of them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.checks import check_tokens

__all__ = ["cross_entropy", "next_tokens", "summed_loss"]

IGNORED = -100


def cross_entropy(
    logits: Float[Tensor, "batch length vocabulary"],
    labels: Int[Tensor, "batch length"],
    num_items_in_batch: Tensor | int | None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over labels other than −100; 0 where there is none, not 0/0.

    The sum is divided by `num_items_in_batch` if the Trainer gives it. The Trainer multiplies the
    loss by the number of processes, which is right only for a loss over the labels of all of them.
    """
    check_tokens("labels", labels)
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            "labels must have one entry per logit: labels (shifted, for a causal model) are "
            f"{tuple(labels.shape)}, logits {tuple(logits.shape[:2])}."
        )
    total = summed_loss(logits.float(), labels)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)


def summed_loss(
    logits: Float[Tensor, "batch length vocabulary"], targets: Int[Tensor, "batch length"]
) -> Float[Tensor, ""]:
    """Σ cross-entropy over targets other than −100, in float32 at least: a sum of many losses in
    half precision would stop growing. The sums of pieces add up to that of the whole.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def next_tokens(labels: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """What each position predicts: the label after it, which may be in another piece."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)
