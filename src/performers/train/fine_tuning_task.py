"""What a pretrained language model or encoder does, by the class that its config names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from performers.convert.fidelity import divergence, real_positions
from performers.convert.modes import evaluating
from performers.convert.sequences import Sequences
from performers.data.masking import NOT_SCORED
from performers.models import PerformerConfig

__all__ = ["ENCODER", "TASKS_OF", "FineTuningTask", "fine_tuning_task"]

MASK_RATE = 0.15


@dataclass(frozen=True)
class FineTuningTask:
    """The task of a model: how the model is loaded for it, and what it is asked and learns."""

    name: str
    auto_class: Any

    def examples(self, sequences: Sequences, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
        """An item per sequence, with labels for language models: a function of the seed."""
        items = [
            {name: x[row] for name, x in sequences.inputs.items()} for row in range(len(sequences))
        ]
        if self.name == "encoder":
            return items
        if self.name == "causal-lm":
            for item in items:
                is_padding = item.get("attention_mask", torch.ones(1)) == 0
                item["labels"] = item["input_ids"].masked_fill(is_padding, NOT_SCORED)
            return items
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE, seed=seed)
        masked = mask(items)
        return [{name: x[row] for name, x in masked.items()} for row in range(len(items))]

    def loss(
        self, model: nn.Module, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The mean of KL(exact ‖ converted) of the predictions, or ‖states − exact‖² / ‖exact‖² of
        an encoder's last hidden states; padding does not count.
        """
        given = {name: x for name, x in batch.items() if name != "labels"}
        name = "last_hidden_state" if self.name == "encoder" else "logits"
        with torch.no_grad():
            exact = getattr(teacher(**given), name)
        out = getattr(model(**given), name)
        is_real = real_positions(exact, given)
        out, exact = out[is_real], exact[is_real]
        if self.name == "encoder":
            return (out - exact).square().sum() / exact.square().sum()
        return divergence(out, exact)

    @torch.no_grad()
    def task_loss(
        self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
    ) -> float | None:
        """The cross-entropy of a language model on the labels of `examples`, in nats per label;
        None for an encoder, and where nothing is labeled.
        """
        if self.name == "encoder":
            return None
        whole, count = 0.0, 0
        with evaluating(model):
            for batch in batches:
                inputs = {name: x.to(model.device) for name, x in batch.items()}
                labels = inputs["labels"][:, 1:] if self.name == "causal-lm" else inputs["labels"]
                scored = int((labels != NOT_SCORED).sum())
                if scored:
                    whole += float(model(**inputs).loss) * scored
                    count += scored
        return whole / count if count else None


ENCODER = FineTuningTask("encoder", AutoModel)
TASKS_OF = {
    FineTuningTask("causal-lm", AutoModelForCausalLM): MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    FineTuningTask("masked-lm", AutoModelForMaskedLM): MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ENCODER: MODEL_MAPPING_NAMES,
}


def fine_tuning_task(config: PreTrainedConfig) -> FineTuningTask:
    """What a saved model does, by the class that its config names.

    Raises ValueError for encoder-decoders, for other heads, and for Performers.
    """
    if isinstance(config, PerformerConfig):
        raise ValueError(
            "a model that is converted must attend exactly, and this one is a Performer already. "
            "Train it as it is, with transformers' Trainer."
        )
    architecture = (config.architectures or ["a model without a name"])[0]
    if not config.is_encoder_decoder:
        for task, names in TASKS_OF.items():
            if architecture in names.values():
                return task
    raise ValueError(
        "a model that recovers from a text must be an encoder, a masked or a causal language "
        f"model, and this is {architecture}. Convert it from Python, with performers.linearize and "
        "performers.calibrate, and train it on its own task."
    )
