"""What one device computes between two steps of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from performers.models import PerformerConfig
from performers.models.layers import PerformerLayer
from performers.train.config import RunConfig
from performers.train.tasks import Model, build_model

__all__ = ["OPTIMIZERS", "Workload", "workload_of"]

# Numbers per weight: what an optimizer remembers, and what its step needs for a moment. On an
# accelerator AdamW takes the roots of all second moments at once, unless its step is fused.
OPTIMIZERS = {"adamw_torch": (2, 1), "adamw_torch_fused": (2, 0), "sgd": (0, 1)}


@dataclass(frozen=True)
class Workload:
    """A step of training on one device.

    `model`: without numbers, on the device "meta"; modules and shapes are read from it.
    `batch`, `length`: sequences that are computed at a time, and tokens of each.
    `accumulation`: how often this is done before the optimizer takes a step.
    `is_half`: products in bfloat16 by autocast; weights stay in float32.
    `is_checkpointed`: the backward pass computes each layer again from its input.
    `optimizer`: a word of `OPTIMIZERS`.
    """

    model: Model
    batch: int
    length: int
    accumulation: int = 1
    is_half: bool = False
    is_checkpointed: bool = False
    optimizer: str = "adamw_torch"

    @property
    def config(self) -> PerformerConfig:
        return self.model.config

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def width(self) -> int:
        """Bytes of a number that products read and write."""
        return 2 if self.is_half else 4

    @property
    def layers(self) -> list[PerformerLayer]:
        return list(self.model.performer.layers)  # type: ignore[arg-type]  # of a ModuleList

    def weights_of_layers(self) -> list[int]:
        return [sum(x.numel() for x in layer.parameters()) for layer in self.layers]

    def products_of_layers(self) -> list[int]:
        """Weights that multiply a matrix, of each layer."""
        return [sum(x.numel() for x in layer.parameters() if x.ndim > 1) for layer in self.layers]

    @property
    def weights(self) -> int:
        return self.model.num_parameters()

    @property
    def bytes_of_buffers(self) -> int:
        """ω and what else is not trained."""
        return sum(x.nbytes for x in self.model.buffers())


def workload_of(config: RunConfig) -> Workload:
    """The step of a run's own model, each of its sequences as long as the run lets it be.

    Raises ValueError for an optimizer whose memory no formula here is about, and for reversible
    layers.
    """
    if config.pretrained is not None:
        raise ValueError(
            "a plan has formulas for Performers, and none for pretrained models. Plan a Performer "
            "of the same sizes, in the section model."
        )
    given = config.trainer
    optimizer = str(given["optim"])
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"a plan knows the memory of {', '.join(OPTIMIZERS)}, got trainer.optim={optimizer}. "
            "Plan with one of these."
        )
    if config.model.get("reversible"):
        raise ValueError(
            "a plan has no formulas for layers with reversible=True, whose memory does not depend "
            "on their number. Plan one with trainer.gradient_checkpointing=true in its place."
        )
    with torch.device("meta"):
        model = build_model(config)
    unless = TrainingArguments
    return Workload(
        model=model,
        batch=given.get("per_device_train_batch_size", unless.per_device_train_batch_size),
        length=config.data.length,
        accumulation=given.get("gradient_accumulation_steps", unless.gradient_accumulation_steps),
        is_half=bool(given.get("bf16") or given.get("fp16")),
        is_checkpointed=bool(
            given.get("activation_checkpointing") or given.get("gradient_checkpointing")
        ),
        optimizer=optimizer,
    )
