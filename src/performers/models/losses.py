"""The loss of every head that predicts a class for each token."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["cross_entropy"]


def cross_entropy(
    logits: Float[Tensor, "batch length vocabulary"],
    labels: Int[Tensor, "batch length"],
    num_items_in_batch: Tensor | int | None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy over labels other than −100; 0 where there is none, not 0/0.

    The sum is divided by `num_items_in_batch` if the Trainer gives it. The Trainer multiplies the
    loss by the number of processes, which is right only for a loss over the labels of all of them.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            "labels must have one entry per logit: labels (shifted, for a causal model) are "
            f"{tuple(labels.shape)}, logits {tuple(logits.shape[:2])}."
        )
    # In float32, because a sum of many losses in half precision would stop growing.
    total = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
