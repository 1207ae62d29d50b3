"""Trainings of equally many steps, whose divergence is a result and not an error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from performers.data.tokens import TokenDataset
from performers.models import PerformerPreTrainedModel
from performers.train.clock import learning_rate_factor
from performers.train.metrics import score_tokens
from performers.train.tasks import Task
from performers.train.trainer import without_needless_mask

__all__ = ["Batch", "Steps", "drawn_batches", "rows_with", "scored_batches", "train_for_steps"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Steps:
    """How a model trains: as in Appendix A.2, with a learning rate that rises over the first
    `warmup_steps` and then stays, or falls as `schedule` says (`learning_rate_factor`).

    `evaluations`: how often it is scored, the end included; at the beginning once more.
    `redraw_every`: after how many steps ω is drawn anew, from step `redraw_from` on; 0 for never.
    """

    steps: int
    evaluations: int
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    schedule: str = "constant"
    weight_decay: float = 0.1
    clip: float = 0.5
    redraw_every: int = 0
    redraw_from: int = 0


def train_for_steps(
    model: PerformerPreTrainedModel,
    batch: Callable[[int], Batch],
    valid: Sequence[Batch],
    plan: Steps,
    shift: bool,
) -> dict[str, Any]:
    """Train on `batch(step)` for all steps, or until a loss or a gradient is no longer a number.

    "curve": (step, accuracy, loss) on `valid` at each evaluation. "gradients": the largest norm of
    the gradient, before clipping, in the steps up to each evaluation but the first. "stopped": the
    step at which it diverged, counted from 1, else None. `shift`: see `score_tokens`.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-9,
        weight_decay=plan.weight_decay,
    )
    every = plan.steps // plan.evaluations
    warmup = plan.warmup_steps / plan.steps
    curve, gradients = [[0, *_score(model, valid, shift)]], []
    largest, stopped = 0.0, None
    model.train()
    for step in range(1, plan.steps + 1):
        factor = learning_rate_factor(plan.schedule, warmup, step / plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = factor * plan.learning_rate
        loss = model(**batch(step - 1)).loss
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), plan.clip))
        if not (math.isfinite(norm) and math.isfinite(float(loss.detach()))):
            stopped = step
            break
        optimizer.step()
        optimizer.zero_grad()
        largest = max(largest, norm)
        if step % every == 0:
            curve.append([step, *_score(model, valid, shift)])
            gradients.append(largest)
            largest = 0.0
        # After the score: a model is scored with the ω that it has trained with.
        if plan.redraw_every and step >= plan.redraw_from and step % plan.redraw_every == 0:
            model.redraw_features()
    return {
        "parameters": model.num_parameters(),
        "curve": curve,
        "gradients": gradients,
        "stopped": stopped,
    }


@torch.no_grad()
def _score(model: nn.Module, valid: Sequence[Batch], shift: bool) -> tuple[float, float | None]:
    """Accuracy and loss; a loss that is no number is None."""
    was_training = model.training
    model.eval()
    sums = sum(
        score_tokens(
            model(**{name: x for name, x in batch.items() if name != "labels"}).logits,
            batch["labels"],
            shift,
        ).sum(0)
        for batch in valid
    )
    model.train(was_training)
    correct, loss, count = torch.as_tensor(sums).tolist()
    found = loss / count
    return correct / count, found if math.isfinite(found) else None


def drawn_batches(
    data: TokenDataset, task: Task, batch_size: int, seed: int
) -> Callable[[int], Batch]:
    """Batches to train on: rows drawn at random, the same at every step for the same seed."""
    collator = task.collator(seed)

    def batch(step: int) -> Batch:
        collator.set_epoch(step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(data), (batch_size,), generator=generator).tolist()
        return without_needless_mask(collator([data[row] for row in rows]), task)

    return batch


def scored_batches(data: TokenDataset, task: Task, batch_size: int, seed: int) -> list[Batch]:
    """All of `data` in batches, with the labels that every model is scored at."""
    collator = task.evaluation_collator(seed)
    items = [data[row] for row in range(len(data))]
    return [
        without_needless_mask(collator(items[start : start + batch_size]), task)
        for start in range(0, len(items), batch_size)
    ]


def rows_with(results: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The rows of an experiment's results in which these fields have these values."""
    return [row for row in results["rows"] if row.items() >= fields.items()]
