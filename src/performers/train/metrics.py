"""The paper's metrics: accuracy, perplexity and bits per character over the scored positions.

A scored position is a masked residue (masked-lm) or a next residue (causal-lm); its label is not
-100. Sums are taken on the device, batch by batch, and no logits are kept.

Source: Choromanski et al. 2021, Appendix A.1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction

__all__ = ["TokenMetrics", "score_tokens"]

UNSCORED = -100


def score_tokens(
    logits: Float[Tensor, "batch length vocabulary"],
    labels: Int[Tensor, "batch length"],
    shift: bool,
) -> Float[Tensor, "batch 3"]:
    """For each row: the number of right scored tokens, Σ −log p in nats, and the number of scored
    tokens.

    `shift`: position i predicts label i + 1, the convention of causal models in transformers.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != UNSCORED
    loss = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=UNSCORED, reduction="none"
    )
    correct = (logits.argmax(dim=-1) == labels) & scored
    return torch.stack([correct.sum(1), loss.double().sum(1), scored.sum(1)], dim=1)


class TokenMetrics:
    """Accumulates `score_tokens` over an evaluation: `compute_metrics` with `batch_eval_metrics`.

    accuracy = Σ correct / n,  loss = Σ −log p / n,  perplexity = e^loss,
    bits_per_character = loss / ln 2
    """

    def __init__(self) -> None:
        self.sums: Tensor | None = None

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        batch = prediction.predictions.sum(0)
        self.sums = batch if self.sums is None else self.sums + batch
        if not compute_result:
            return {}
        correct, loss, count = self.sums.tolist()
        self.sums = None
        return summarize(correct, loss, count)


def summarize(correct: float, loss: float, count: float) -> dict[str, float]:
    """The paper's metrics from three sums over the scored positions."""
    if count == 0:
        raise ValueError(
            "an evaluation must score at least one token, but no position of the set is labelled. "
            "Take more or longer sequences."
        )
    mean = loss / count
    return {
        "accuracy": correct / count,
        "loss": mean,
        "perplexity": math.exp(mean),
        "bits_per_character": mean / math.log(2),
        "num_scored": int(count),
    }
