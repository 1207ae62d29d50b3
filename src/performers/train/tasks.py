"""The two tasks of the paper's experiments: what is scored, and by which model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from performers.data.masking import NOT_SCORED, CausalCollator, Collator, MaskedCollator
from performers.data.vocabulary import (
    AMINO_ACID_IDS,
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    VOCAB_SIZE,
)
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.train.config import RunConfig
from performers.train.pretrained import unloaded

__all__ = [
    "TASKS",
    "HiddenTokens",
    "Task",
    "build_model",
    "masked_lm",
    "model_config",
    "unloaded_model",
]

Model = PerformerForMaskedLM | PerformerForCausalLM


@dataclass(frozen=True)
class Task:
    """A model and its batches, which a seed determines.

    `evaluation_collator`: the same batches, with labels only where the input does not give the
    answer.
    `shift`: True if the logits of a position belong to the label of the next one.
    """

    model: type[Model]
    collator: Callable[[int], Collator]
    evaluation_collator: Callable[[int], Collator]
    shift: bool


class HiddenTokens(MaskedCollator):
    """BERT's masking, with labels only where a token is hidden.

    BERT also chooses tokens that it leaves as they are, or replaces by others. They help a model to
    train, but do not test it: one in ten answers would be right by copying the input, which by
    itself is better than the empirical baseline.
    """

    def __call__(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        seen = batch["input_ids"] != self.mask_token_id
        return {**batch, "labels": batch["labels"].masked_fill(seen, NOT_SCORED)}


def masked_lm(token_ids: range = AMINO_ACID_IDS) -> Task:
    """Predicting hidden tokens of `token_ids`, the upper end of a vocabulary."""
    return Task(
        model=PerformerForMaskedLM,
        collator=lambda seed: MaskedCollator(seed=seed, token_ids=token_ids),
        evaluation_collator=lambda seed: HiddenTokens(seed=seed, token_ids=token_ids),
        shift=False,
    )


TASKS = {
    "masked-lm": masked_lm(),
    "causal-lm": Task(
        model=PerformerForCausalLM,
        collator=lambda seed: CausalCollator(),
        evaluation_collator=lambda seed: CausalCollator(),
        shift=True,
    ),
}


def model_config(config: RunConfig) -> PerformerConfig:
    """The model of a run, with the vocabulary of the amino acids.

    Raises ValueError or TypeError for values that do not fit together.
    """
    return PerformerConfig(
        **config.model,
        seed=config.seed,
        vocab_size=VOCAB_SIZE,
        pad_token_id=PAD_TOKEN_ID,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        is_decoder=config.task == "causal-lm",
    )


def unloaded_model(config: RunConfig) -> PreTrainedModel:
    """The run's own model on the meta device: its modules, and the shapes of its weights."""
    if config.pretrained is not None:
        return unloaded(config.pretrained)
    with torch.device("meta"):
        return build_model(config)


def build_model(config: RunConfig) -> Model:
    """A Performer with fresh weights, drawn from torch's global generator."""
    return TASKS[config.task].model(model_config(config))
