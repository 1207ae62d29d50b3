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
from performers.models.config import changed
from performers.records.environment import memory_of_machine
from performers.train.byte_tokenizer import byte_tokenizer
from performers.train.config import RunConfig
from performers.train.pretrained import unloaded

__all__ = [
    "TASKS",
    "HiddenTokens",
    "Task",
    "build_model",
    "check_size",
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
    """The model of a run, with the vocabulary of the amino acids, or with bytes for text.

    Raises ValueError or TypeError for values that do not fit together.
    """
    size, begin, end = VOCAB_SIZE, BOS_TOKEN_ID, EOS_TOKEN_ID
    if config.data.text is not None:
        tokenizer = byte_tokenizer()
        size, begin, end = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    return PerformerConfig(
        **config.model,
        seed=config.seed,
        vocab_size=size,
        pad_token_id=PAD_TOKEN_ID,  # of both
        bos_token_id=begin,
        eos_token_id=end,
        is_decoder=config.task == "causal-lm",
    )


def check_size(config: RunConfig) -> None:
    """Refuse a model that this machine cannot hold, before one is made: its weights and gradients,
    of which shares of weights are the less.

    Raises ValueError that says what it takes. Of layers that are alike one is made, without memory.
    """
    if config.pretrained is not None:
        return
    whole = model_config(config)
    repeats = 1
    if not isinstance(whole.attention, list):
        repeats, whole = whole.num_hidden_layers, changed(whole, num_hidden_layers=1)
    remedy = "Make hidden_size, intermediate_size, num_hidden_layers or num_projections smaller."
    try:
        with torch.device("meta"):
            model = TASKS[config.task].model(whole)
    except RuntimeError as error:  # of an allocator, or of a number of bytes beyond 64 bits
        raise ValueError(
            f"the model must fit into memory, and does not: {str(error).splitlines()[0]}. {remedy}"
        ) from error
    layers = sum(x.numel() for x in model.performer.layers.parameters())
    weights = model.num_parameters() + (repeats - 1) * layers
    what, bytes_each = ("weights", 4) if config.shard_weights else ("weights and gradients", 8)
    needed, most = bytes_each * weights, memory_of_machine()
    if most is not None and needed > most:
        raise ValueError(
            f"the model must fit into memory, and does not: its {what} take "
            f"{needed / 2**30:,.1f} GiB, and this machine has {most / 2**30:,.1f} GiB. {remedy}"
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
