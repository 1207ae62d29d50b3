"""transformers' Trainer, set up as the paper trains: arguments, collators, metrics, callbacks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers import trainer as transformers_trainer
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
from transformers.utils.logging import disable_progress_bar

from performers.backends.buffers import buffers
from performers.convert.learned import load_learned
from performers.data.masking import Collator
from performers.distributed.collectives import summed
from performers.distributed.models import own_piece
from performers.models.losses import cross_entropy, next_tokens
from performers.models.modeling import PerformerPreTrainedModel
from performers.records.environment import PeakMemory, peak_of_tensors
from performers.train.checkpoints import (
    SealCheckpoints,
    last_whole_checkpoint,
    loading_state,
    remove_fragments,
    saving,
    seconds_until,
    steps_of,
)
from performers.train.clock import NEVER, TrainingClock, learning_rate_factor
from performers.train.config import RunConfig
from performers.train.laid_out import LaidOutTrainer
from performers.train.layout import Layout
from performers.train.metrics import TokenMetrics, score_tokens
from performers.train.redraw import RedrawFeatures
from performers.train.tasks import TASKS, Task

__all__ = [
    "TokenTrainer",
    "show_progress",
    "train_to_the_end",
    "training_arguments",
    "without_needless_mask",
]


def training_arguments(config: RunConfig, folder: Path) -> TrainingArguments:
    """The Trainer's arguments for one model whose files lie in `folder`.

    Raises ValueError for values that transformers refuses.
    """
    trainer = {"dataloader_pin_memory": False, "logging_nan_inf_filter": False, **config.trainer}
    trainer["report_to"] = trainer.get("report_to") or "none"
    if config.max_seconds is not None:
        trainer |= {"max_steps": NEVER} | dict.fromkeys(_shares(config.trainer), NEVER)
    return TrainingArguments(
        **trainer,
        output_dir=str(folder / "checkpoints"),
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps",
        batch_eval_metrics=True,
        include_num_input_tokens_seen="non_padding",
        run_name=str(folder),
        # Items of a stream say which pass they are of, and every process reads the stream by
        # itself: one that read for all would have to pad their batches alike.
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
    )


# What a share of the time makes the Trainer do.
ACTIONS = {
    "logging_steps": "should_log",
    "eval_steps": "should_evaluate",
    "save_steps": "should_save",
}


def _shares(trainer: Mapping[str, Any]) -> dict[str, float]:
    """The intervals, of three, that are shares of the run: those below 1, as in transformers."""
    return {key: trainer[key] for key in ACTIONS if 0 < (trainer.get(key) or 0) < 1}


class TokenTrainer(LaidOutTrainer):
    """A Trainer that scores as the paper does, and seals its checkpoints when they are complete.

    `task`: that of the config, on proteins, unless given. `valid`: several sets, by name, are each
    scored: "eval_NAME_accuracy". `peak_memory`: the most bytes of weights, gradients, optimizer
    state and activations; None if nothing was trained. `resident_memory`: on a CPU, what the
    process took beside what it had, see `PeakMemory`.
    """

    data_collator: Any

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        model: PreTrainedModel,
        train: Dataset,
        valid: Dataset | dict[str, Dataset],
        seconds: float = 0.0,
        task: Task | None = None,
    ) -> None:
        task = task or TASKS[config.task]
        shares = {ACTIONS[key]: share for key, share in _shares(config.trainer).items()}
        self.clock = TrainingClock(seconds, config.max_seconds, shares)
        arguments = training_arguments(config, folder)
        layout = Layout.of(config, arguments.world_size)
        # This collator stays at epoch 0, so that every evaluation scores the same positions.
        self.evaluation_collator = task.evaluation_collator(config.seed)
        collator = task.collator(config.seed)
        if layout.pieces > 1:  # at least one token for each
            for one in (collator, self.evaluation_collator):
                one.pad_to_multiple_of = layout.pieces
        callbacks: list[TrainerCallback] = [
            self.clock,
            SealCheckpoints(self.clock),
            SetMaskingEpoch(collator),
            StopWhenDiverged(
                "Start again with a lower trainer.learning_rate or with trainer.warmup_steps."
            ),
        ]
        if config.redraw_every:
            callbacks.append(RedrawFeatures(config.redraw_every))
        # Not every model of transformers divides its loss by the labels of all processes.
        is_own = isinstance(model, PerformerPreTrainedModel)
        smooths, splits = arguments.label_smoothing_factor > 0, layout.pieces > 1
        super().__init__(
            layout,
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=valid,
            compute_metrics=TokenMetrics(),
            compute_loss_func=None if is_own or smooths or splits else partial(_loss, task),
            callbacks=callbacks,
        )
        if splits:  # it takes the number of labels of all processes, whatever its forward says
            self.model_accepts_loss_kwargs = True
        self.task = task
        self.peak_memory: int | None = None
        self.resident_memory: int | None = None
        show_progress(self, ProgressLine(config.attention, self.clock))
        if self.is_world_process_zero():
            events = TensorBoardCallback()
            events.logging_dir = str(folder / "tensorboard")
            self.add_callback(events)

    def measure(self, memory: PeakMemory) -> None:
        """Say what training took, at its end. On a CPU the tensors of one more step are counted,
        which changes nothing."""
        if self.args.device.type != "cpu":
            self.peak_memory = memory.measure()
            return
        self.resident_memory = memory.measure()
        if not self.layout.is_plain:
            return
        model, states = self.model_wrapped, self.optimizer.state.values()
        held = [*model.parameters(), *model.buffers()]
        held += [x for state in states for x in state.values() if isinstance(x, Tensor)]
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(self.get_train_dataloader()))
            buffers.trim(0)  # or the tiles that training has kept would not be counted
            peak = peak_of_tensors(lambda: self.training_step(model, batch))
        model.zero_grad()
        self.peak_memory = peak + sum(x.nbytes for x in held)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        collator, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """With a limit of time the learning rate follows the clock, not the steps."""
        if self.clock.limit is None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule, warmup = str(self.args.lr_scheduler_type.value), self.args.warmup_steps
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate_factor(schedule, warmup, self.clock.share),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = without_needless_mask(inputs, self.task)
        if not isinstance(self.model, PerformerPreTrainedModel) and self.task.shift:
            inputs = {**inputs, "use_cache": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`score_tokens` in the place of logits, which are those of a piece."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if logits is None or labels is None:
            return loss, logits, labels
        pieces, shift = self.places.pieces, self.task.shift
        if pieces is None:
            return loss, score_tokens(logits, labels, shift), labels
        targets = next_tokens(labels) if shift else labels
        own = targets[:, own_piece(labels.shape[1], pieces)]
        return loss, summed(score_tokens(logits, own, shift=False), pieces), labels

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading_state(checkpoint):
            super()._load_rng_state(checkpoint)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to every entry the seconds of training so far."""
        super().log({**logs, "seconds": self.clock.seconds}, *args, **kwargs)


def _loss(task: Task, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Of a model of transformers, whatever it makes of labels itself."""
    targets = next_tokens(labels) if task.shift else labels
    return cross_entropy(outputs["logits"], targets, num_items_in_batch)


def without_needless_mask(batch: dict[str, Any], task: Task) -> dict[str, Any]:
    """The batch without its mask where nothing is padded: exact attention is then faster.

    Causal models need none at all, because batches are padded on the right: a real token never sees
    what comes after it.
    """
    mask = batch.get("attention_mask")
    if mask is not None and (task.shift or bool((mask == 1).all())):
        return {name: value for name, value in batch.items() if name != "attention_mask"}
    return batch


def train_to_the_end(
    config: RunConfig,
    folder: Path,
    build: Callable[[], PreTrainedModel],
    train: Dataset,
    valid: Dataset | dict[str, Dataset],
    task: Task | None = None,
) -> TokenTrainer:
    """Train the model that `build` returns, from the last whole checkpoint if there is one.

    The trainer that is returned has the weights, the log (`state.log_history`) and the seconds
    (`clock.seconds`) of the last checkpoint: an interrupted run ends as an uninterrupted one does.
    """
    # The Trainer has bars of its own; one for every file that is saved would break them up.
    disable_progress_bar()
    checkpoints = folder / "checkpoints"
    state = PartialState()
    if state.is_main_process:
        for fragment in remove_fragments(checkpoints):
            print(f"Removed {fragment}: it was not whole.", file=sys.stderr)
    state.wait_for_everyone()
    checkpoint = last_whole_checkpoint(checkpoints)
    seconds = 0.0 if checkpoint is None else seconds_until(checkpoint)
    buffers.trim(0)  # of another model
    memory = PeakMemory()
    set_seed(config.seed)
    # A Trainer that resumes at its last step would take one step more.
    has_ended = checkpoint is not None and _has_ended(checkpoint, config.max_seconds)
    now = config.laid_out_plainly if has_ended else config
    trainer = TokenTrainer(now, folder, build(), train, valid, seconds, task)
    if not has_ended:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.measure(memory)
        end_tracking(trainer)
        state.wait_for_everyone()  # the main process seals the checkpoint
        checkpoint = last_whole_checkpoint(checkpoints)
        if not trainer.layout.is_plain:  # what follows takes whole models, without gradients
            peaks = trainer.peak_memory, trainer.resident_memory
            seconds = trainer.clock.seconds
            now = config.laid_out_plainly
            trainer = TokenTrainer(now, folder, build(), train, valid, seconds, task)
            trainer.peak_memory, trainer.resident_memory = peaks
    assert checkpoint is not None, "the Trainer saves the last step"
    model = trainer.accelerator.unwrap_model(trainer.model)
    load_model(model, checkpoint / "model.safetensors")
    if not isinstance(model, PerformerPreTrainedModel):
        load_learned(model, checkpoint)
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return trainer


def end_tracking(trainer: Trainer) -> None:
    """End what trackers were told of one model: the next one of a run has a run of theirs too.

    MLflow's ends by itself with the training, and would begin another with the first score after.
    """
    for callback in (MLflowCallback, WandbCallback):
        trainer.remove_callback(callback)
    if "wandb" in trainer.args.report_to and trainer.is_world_process_zero():
        import_module("wandb").finish()


def _has_ended(checkpoint: Path, max_seconds: float | None) -> bool:
    done, planned = steps_of(checkpoint)
    if max_seconds is not None:
        return seconds_until(checkpoint) >= max_seconds
    return done >= planned


class SetMaskingEpoch(TrainerCallback):
    """Tells the collator which epoch begins, so that every epoch masks other residues."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


class StopWhenDiverged(TrainerCallback):
    """Ends a run whose loss is no longer a number, before such weights are saved.

    `remedy`: a sentence, what to try instead. Raises FloatingPointError.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training diverged: the loss is {loss} at step {state.global_step}. {self.remedy}"
            )


def show_progress(trainer: Trainer, line: ProgressLine) -> None:
    """Put a line in the place of what a Trainer shows by itself; nothing under `disable_tqdm`.

    What it shows by itself is another callback in a notebook, which makes a table.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(transformers_trainer.DEFAULT_PROGRESS_CALLBACK)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(line)


SHOWN = {"loss": "loss", "eval_loss": "valid loss", "eval_accuracy": "valid accuracy"}


class ProgressLine(ProgressCallback):
    """A progress bar that carries the latest numbers, instead of printing every log entry.

    It counts steps, or seconds if `clock` has a limit.
    """

    def __init__(self, description: str, clock: TrainingClock | None = None) -> None:
        super().__init__()
        self.description = description
        self.clock = clock
        self.latest: dict[str, str] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"training {self.description}")
            if self.clock is not None and self.clock.limit is not None:
                self.training_bar.total = self.clock.limit
                self.training_bar.bar_format = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.clock is None or self.clock.limit is None:
            super().on_step_end(*args, **kwargs)
        elif self.training_bar is not None:
            self.training_bar.update(
                min(self.clock.seconds, self.clock.limit) - self.training_bar.n
            )

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_prediction_step(*args, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description(f"evaluating {self.description}")
            self.prediction_bar.leave = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logged = logs or {}
        self.latest |= {name: f"{logged[key]:.3f}" for key, name in SHOWN.items() if key in logged}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.latest)
