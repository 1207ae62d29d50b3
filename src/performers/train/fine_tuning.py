"""Fine-tuning a converted model, so that it does again what the exact one did.

Language models learn their own task. An encoder has no task of its own, so it learns the last
hidden states of the exact model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from performers.convert.modes import evaluating
from performers.models import PerformerConfig
from performers.train.checkpoints import (
    SealCheckpoints,
    last_whole_checkpoint,
    remove_fragments,
    saving,
    steps_of,
)
from performers.train.clock import TrainingClock
from performers.train.trainer import ProgressLine, StopWhenDiverged

__all__ = ["FineTuningTask", "fine_tune", "fine_tuning_task"]

MASK_RATE = 0.15


@dataclass(frozen=True)
class FineTuningTask:
    """The task of a model: how the model is loaded for it, its loss, and its measure of quality.

    `measure`: the name of `quality`. An encoder's sentence embedding is the mean of its last hidden
    states, whose cosine to the exact embedding is measured.
    """

    name: str
    auto_class: Any
    measure: str

    def examples(
        self, rows: Int[Tensor, "sequences length"], tokenizer: Any, seed: int
    ) -> list[dict[str, Tensor]]:
        """An item per row, with labels for language models: a function of the seed."""
        if self.name == "encoder":
            return [{"input_ids": row} for row in rows]
        if self.name == "causal-lm":
            return [{"input_ids": row, "labels": row} for row in rows]
        mask = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE, seed=seed)
        masked = mask(list(rows))
        return [
            {"input_ids": hidden, "labels": labels}
            for hidden, labels in zip(masked["input_ids"], masked["labels"], strict=True)
        ]

    def loss(
        self, model: nn.Module, teacher: PreTrainedModel, batch: Mapping[str, Tensor]
    ) -> Tensor:
        """Cross-entropy, or ‖states − exact‖² / ‖exact‖² of an encoder's last hidden states."""
        if self.name != "encoder":
            loss: Tensor = model(**batch).loss
            return loss
        with torch.no_grad():
            exact = teacher(**batch).last_hidden_state
        states = model(**batch).last_hidden_state
        return (states - exact).square().sum() / exact.square().sum()

    @torch.no_grad()
    def quality(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> float:
        """The mean of `measure` over batches of `examples`."""
        found = []
        with evaluating(model):
            for batch in batches:
                inputs = {name: x.to(model.device) for name, x in batch.items()}
                if self.name == "encoder":
                    pair = [one(**inputs).last_hidden_state.mean(dim=1) for one in (model, teacher)]
                    found.append(float(F.cosine_similarity(*pair).mean()))
                else:
                    found.append(float(self.loss(model, teacher, inputs)))
        return sum(found) / len(found)


ENCODER = FineTuningTask("encoder", AutoModel, "cosine to the exact embedding")
TASKS_OF = {
    FineTuningTask("causal-lm", AutoModelForCausalLM, "loss"): MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    FineTuningTask("masked-lm", AutoModelForMaskedLM, "loss"): MODEL_FOR_MASKED_LM_MAPPING_NAMES,
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


def fine_tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    task: FineTuningTask,
    rows: Int[Tensor, "sequences length"],
    tokenizer: Any,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    lora_rank: int,
    seed: int,
) -> PreTrainedModel:
    """Fine-tune all weights with AdamW, the learning rate falling linearly after a short rise.

    `lora_rank`: if above 0, a product of two matrices of this rank is trained beside the weight of
    every linear layer, and added to that weight at the end (Hu et al. 2022).

    Dropout is off, because the model corrects an error and learns nothing new. Checkpoints go to
    `folder`. If it has whole ones, training continues from the last, and ends with the same weights
    as without the interruption. Trains in place; returns the model.

    Raises FloatingPointError where the loss is no longer finite.
    """
    set_seed(seed)
    if lora_rank:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        trained: Any = get_peft_model(
            model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        )
    else:
        trained = model
    remove_fragments(folder)
    checkpoint = last_whole_checkpoint(folder)
    clock = TrainingClock()
    trainer = FineTuningTrainer(
        model=trained,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=min(10, steps // 10),
            lr_scheduler_type="linear",
            logging_steps=max(1, steps // 20),
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=max(1, steps // 5),
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=_Items(task, rows, tokenizer, steps * batch_size, seed),
        callbacks=[
            clock,
            SealCheckpoints(clock),
            StopWhenDiverged("Start again with a lower learning_rate."),
        ],
    )
    trainer.task, trainer.teacher = task, teacher
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressLine("recovery"))
    # A Trainer that resumes at its last step would take one step more.
    if checkpoint is not None and steps_of(checkpoint)[0] >= steps:
        if lora_rank:
            adapter = load_file(checkpoint / "adapter_model.safetensors")
            set_peft_model_state_dict(trained, adapter)
        else:
            load_model(model, checkpoint / "model.safetensors")
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return (trained.merge_and_unload() if lora_rank else trained).eval()


class FineTuningTrainer(Trainer):
    """A Trainer with the loss of a `FineTuningTask`."""

    task: FineTuningTask
    teacher: PreTrainedModel

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        model.eval()  # the Trainer sets dropout on before each step
        return self.task.loss(model, self.teacher, inputs)


class _Items(Dataset):
    """`count` items from rows, which repeat as often as needed, and are masked anew each time.

    All steps are one epoch, so that an item is a function of its number and the seed.
    """

    def __init__(
        self, task: FineTuningTask, rows: Tensor, tokenizer: Any, count: int, seed: int
    ) -> None:
        self.task, self.rows, self.tokenizer = task, rows, tokenizer
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number % len(self.rows)]
        (item,) = self.task.examples(row[None], self.tokenizer, self.seed + number)
        return item
