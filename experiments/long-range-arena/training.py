"""One training of one mechanism on one task: its score, its speed and its memory."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from performers.data.labeled import PADDING, LabeledSequences
from performers.models import (
    PerformerConfig,
    PerformerForSequenceClassification,
    PerformerForSequencePairClassification,
)
from performers.records import PeakMemory
from performers.train.clock import learning_rate_factor, time_on

from .tasks import Amount, Split, Task


@dataclass(frozen=True)
class Model:
    """The size of a model, the same for every mechanism."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    head_dim: int | None = None
    hidden_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    position: str = "learned"


@dataclass(frozen=True)
class Training:
    """`learning_rate`: its peak, after a share `warmup` of the training; then it falls as a cosine.
    `seconds`: of training; None: `steps`.
    """

    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    steps: int
    seconds: float | None = None


def build(
    task: Task,
    amount: Amount,
    model: Model,
    mechanism: dict[str, Any],
    num_projections: int,
    seed: int,
) -> nn.Module:
    """A classifier with fresh weights, which are the same for the same seed."""
    config = PerformerConfig(
        **vars(model),
        **mechanism,
        vocab_size=task.vocab_size,
        num_labels=task.num_labels,
        pad_token_id=PADDING if task.is_padded else None,
        max_position_embeddings=amount.length,
        num_projections=num_projections,
        seed=seed,
    )
    torch.manual_seed(seed)
    kind = (
        PerformerForSequencePairClassification
        if task.is_pair
        else PerformerForSequenceClassification
    )
    return kind(config)


def train(
    model: nn.Module, task: Task, split: Split, training: Training, seed: int
) -> dict[str, Any]:
    """Train for the seconds of the training, or for its steps, and score once at the end.

    Seconds are those of the steps alone, by `time_on`. Before the clock starts there is one forward
    and one backward pass, so that no mechanism pays for compiling.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    model.train()
    _loss(model, task, split.train, training.batch_size, generator).backward()
    optimizer.zero_grad()
    steps, used = 0, 0.0
    share = 0.0
    while share < 1:
        began = time_on(device)
        factor = learning_rate_factor("cosine", training.warmup, share)
        optimizer.param_groups[0]["lr"] = factor * training.learning_rate
        _loss(model, task, split.train, training.batch_size, generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        used += time_on(device) - began
        steps += 1
        share = steps / training.steps if training.seconds is None else used / training.seconds
    return {
        "accuracy": evaluate(model, task, split.test, training.batch_size),
        "steps": steps,
        "seconds": used,
    }


def _loss(
    model: nn.Module, task: Task, data: LabeledSequences, size: int, generator: torch.Generator
) -> Tensor:
    """Of a batch that is drawn at random."""
    chosen = torch.randint(len(data), (size,), generator=generator).to(data.tokens.device)
    return model(**task.inputs(data.tokens[chosen]), labels=data.labels[chosen]).loss


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: LabeledSequences, size: int) -> float:
    """The share of sequences whose label has the largest logit."""
    model.eval()
    right = 0
    for tokens, labels in zip(data.tokens.split(size), data.labels.split(size), strict=True):
        right += int((model(**task.inputs(tokens)).logits.argmax(-1) == labels).sum())
    return right / len(data)


def measure(
    task: Task, split: Split, settings: tuple[Amount, Model, Training], mechanism: dict[str, Any],
    num_projections: int, seed: int, device: str,
) -> dict[str, Any]:  # fmt: skip
    """`train` a new model; also the most memory in use meanwhile, beyond the data."""
    amount, size, training = settings
    moved = [LabeledSequences(data.tokens.to(device), data.labels.to(device)) for data in split[:2]]
    memory = PeakMemory()
    with warnings.catch_warnings():
        # Features that can be negative are measured, too.
        warnings.simplefilter("ignore", UserWarning)
        model = build(task, amount, size, mechanism, num_projections, seed).to(device)
    found = train(model, task, Split(*moved, split.origin), training, seed)
    return {**found, "bytes": memory.measure()}
