"""Fine-tuning a converted model, so that it does again what the exact one does.

The exact model is the teacher: a language model learns its predictions, an encoder its last hidden
states. A loss on the text itself would teach the model the text, and move it away from the exact
one. The weights that are kept are those of the highest fidelity on text that is not trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from performers.convert.sequences import Sequences
from performers.records.files import read_json
from performers.train.checkpoints import (
    SealCheckpoints,
    last_whole_checkpoint,
    remove_fragments,
    saving,
    steps_of,
    write_atomically,
)
from performers.train.clock import TrainingClock
from performers.train.fine_tuning_task import FineTuningTask
from performers.train.trainer import ProgressLine, StopWhenDiverged, show_progress

__all__ = ["fine_tune"]

# How often at most the distance to the exact model is measured, after how many measurements without
# an improvement fine-tuning ends, and what share of the forward passes measuring may add.
MEASUREMENTS = 10
PATIENCE = 3
MEASURING = 0.25


def fine_tune(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    task: FineTuningTask,
    sequences: Sequences,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    lora_rank: int,
    seed: int,
    measure: Callable[[PreTrainedModel], float],
    measured_sequences: int = 0,
) -> PreTrainedModel:
    """Fine-tune all weights with AdamW, the learning rate falling linearly after a short rise.

    `measure`: the distance to the exact model on `measured_sequences` that are not trained on. It
    is measured ten times, but not so often that it takes more than a quarter as long as training.
    Training ends early where three measurements in a row are no improvement. The weights of the
    smallest distance are kept, be it those from before.

    `lora_rank`: if above 0, a product of two matrices of this rank is trained beside the weight of
    every linear layer, and added to that weight at the end (Hu et al. 2022).

    Dropout is off, because the model corrects an error and learns nothing new. Checkpoints go to
    `folder`. If it has whole ones, training continues from the last, and ends with the same weights
    as without the interruption. Trains in place; returns the model.

    Raises FloatingPointError where the loss is no longer finite.
    """
    set_seed(seed)
    if lora_rank:
        from peft import LoraConfig, get_peft_model

        trained: Any = get_peft_model(
            model, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
        )
    else:
        trained = model
    remove_fragments(folder)
    checkpoint = last_whole_checkpoint(folder)
    clock = TrainingClock()
    # Both models read what is measured; in a step the backward pass counts as two more.
    rarely = math.ceil(2 * measured_sequences / (MEASURING * 4 * batch_size))
    every = min(steps, max(1, steps // MEASUREMENTS, rarely))
    # Under LoRA too, the model itself is what its layers were put into.
    best = KeepBest(folder, every, steps, lambda: measure(model))
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
            save_steps=every,
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            report_to="none",
        ),
        train_dataset=_Items(task, sequences, tokenizer, steps * batch_size, seed),
        callbacks=[
            clock,
            best,
            SealCheckpoints(clock),
            StopWhenDiverged("Start again with a lower learning_rate."),
        ],
    )
    trainer.task, trainer.teacher = task, teacher
    show_progress(trainer, ProgressLine("recovery"))
    done = 0 if checkpoint is None else steps_of(checkpoint)[0]
    if checkpoint is None:
        best.start(trained)
    else:
        best.resume(done)
    # A Trainer that resumes at its last step would take one step more.
    if done < steps and not best.is_over:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    best.load(trained)
    return (trained.merge_and_unload() if lora_rank else trained).eval()


class KeepBest(TrainerCallback):
    """Measures the model every so many steps, keeps the best weights in a file, and ends training
    that no longer improves.

    What was measured is a file too, so that a run that was interrupted goes on as if it had not
    been.
    """

    def __init__(self, folder: Path, every: int, steps: int, measure: Callable[[], float]) -> None:
        self.every, self.steps, self.measure = every, steps, measure
        self.weights, self.record = folder / "best.safetensors", folder / "distances.json"
        self.distances: dict[int, float] = {}

    @property
    def is_over(self) -> bool:
        """Whether the last measurements were no improvement."""
        best = min(self.distances, key=lambda step: self.distances[step])
        return sum(step > best for step in self.distances) >= PATIENCE

    def start(self, model: nn.Module) -> None:
        self.weights.parent.mkdir(parents=True, exist_ok=True)
        self._measure(model, 0)

    def resume(self, step: int) -> None:
        """Take up the measurements until a step; later ones will be made again."""
        written = read_json(self.record, remedy="Start again with --force.")
        self.distances = {int(at): x for at, x in written.items() if int(at) <= step}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == self.steps:
            self._measure(kwargs["model"], state.global_step)
            control.should_training_stop = control.should_training_stop or self.is_over

    def load(self, model: nn.Module) -> None:
        """Put the best weights into a model."""
        best = load_file(self.weights)
        with torch.no_grad():
            for name, weight in _learning(model).items():
                weight.copy_(best[name])

    def _measure(self, model: Any, step: int) -> None:
        distance = self.measure()
        distance = distance if math.isfinite(distance) else math.inf
        is_best = not self.distances or distance < min(self.distances.values())
        self.distances[step] = distance
        if is_best:
            partial = self.weights.with_suffix(".partial")
            with saving(self.weights):
                save_file({name: x.contiguous() for name, x in _learning(model).items()}, partial)
                partial.replace(self.weights)
        write_atomically(self.record, json.dumps(self.distances))


def _learning(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


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
        self, task: FineTuningTask, sequences: Sequences, tokenizer: Any, count: int, seed: int
    ) -> None:
        self.task, self.sequences, self.tokenizer = task, sequences, tokenizer
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = torch.tensor([number % len(self.sequences)])
        (item,) = self.task.examples(self.sequences[row], self.tokenizer, self.seed + number)
        return item
