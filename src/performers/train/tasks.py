"""The two tasks of the paper's protein experiments: what is scored, and by which model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from performers.data.masking import CausalCollator, Collator, MaskedCollator
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.train.config import RunConfig

__all__ = ["TASKS", "Task", "build_model", "model_config"]

Model = PerformerForMaskedLM | PerformerForCausalLM


@dataclass(frozen=True)
class Task:
    """`shift`: whether the logits of a position belong to the label of the next one."""

    model: type[Model]
    collator: Callable[[int], Collator]
    shift: bool


TASKS = {
    "masked-lm": Task(PerformerForMaskedLM, lambda seed: MaskedCollator(seed=seed), shift=False),
    "causal-lm": Task(PerformerForCausalLM, lambda seed: CausalCollator(), shift=True),
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


def build_model(config: RunConfig) -> Model:
    """A model with fresh weights, drawn from torch's global generator."""
    return TASKS[config.task].model(model_config(config))
