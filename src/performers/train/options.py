"""Which fields of transformers' TrainingArguments a run may set, and why not the others.

`TRAINER_OPTIONS` has a row for every field: what its value must be, or the reason why a run refuses
it. A field without a row, of a later transformers, is refused as well: nobody has looked at what it
does to a run.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn
from torch.compiler import list_backends
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler

from performers.checks import MOST, check_choice, described, is_finite

__all__ = ["REFUSED_OPTIONS", "TRACKERS", "TRAINER_OPTIONS", "Served", "check_arguments"]


@dataclass(frozen=True)
class Served:
    """A field that a run may set. A number must be finite and within these bounds.

    `otherwise`: what to do about a value that is out of bounds. `words`: the only values, if there
    are few; `keys`: those of a mapping, each with its words, or with none if it is true or false.
    """

    least: int | float = -math.inf
    above: int | float = -math.inf
    below: int | float = math.inf
    most: int | float = math.inf
    otherwise: str = ""
    words: Collection[str] = ()
    keys: Mapping[str, Collection[str]] = field(default_factory=dict)

    def check(self, key: str, value: Any) -> None:
        """Raise ValueError for a value that a run cannot train with."""
        if isinstance(value, int) and value > MOST:
            raise ValueError(f"{key} must be at most {MOST}, got {described(value)}.")
        if self.words and value is not None:
            for word in value if isinstance(value, list) else [value]:
                check_choice(key, word, self.words)
        if self.keys and value is not None:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key} must be a mapping of keys, got {described(value)}.")
            for name, chosen in value.items():
                check_choice(f"key of {key}", name, self.keys)
                if self.keys[name]:
                    check_choice(f"{key}.{name}", chosen, self.keys[name])
                elif not isinstance(chosen, bool):
                    raise ValueError(
                        f"{key}.{name} must be true or false, got {described(chosen)}."
                    )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        bounds = {
            "at least": self.least, "above": self.above, "below": self.below, "at most": self.most
        }  # fmt: skip
        is_within = self.least <= value < self.below and self.above < value <= self.most
        if is_within and is_finite(value):
            return
        asked = [f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound)]
        # A number without bounds must be finite.
        must = " and ".join([*asked, *(["finite"] if self.below == self.most == math.inf else [])])
        raise ValueError(f"{key} must be {must}, got {described(value)}. {self.otherwise}".rstrip())


# Those that need no further package, for a run is to be resumed anywhere, and the keys of
# `optim_args` that count for each: transformers passes over others in silence.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    "sgd": ("momentum", "dampening", "nesterov"),
}

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# Of torch.utils.checkpoint.checkpoint, those that YAML can hold: `Served.keys`.
CHECKPOINTING: dict[str, tuple[str, ...]] = {
    "use_reentrant": (),
    "preserve_rng_state": (),
    "determinism_check": ("default", "none"),
    "debug": (),
    "early_stop": (),
}

# A worker is a process of its own: many more than processors ends in a machine that answers no one.
MOST_WORKERS = 16 * (os.cpu_count() or 1)
# Each worker holds so many batches, which a stream never ends to give.
MOST_PREFETCHED = 1024

LOG_LEVELS = ("passive", "debug", "info", "warning", "error", "critical")

# Of a field that has no row.
UNKNOWN = "this version of performers does not know what it does to a run"

# Who is told what a run logs, beside TensorBoard's events, which are always written. Each word of
# `report_to` is also the name of a package.
TRACKERS = ("mlflow", "wandb")

# Reasons that several rows share.
RESUMED = "a resumed run would not end with the same numbers"
REPORTED = "trackers are those of trainer.report_to"
NOT_PUSHED = "push the model/ folder of the run yourself"
LAST_STEP = "the report is about the last step of every model"
METRICS = "the metrics are those of the paper, summed batch by batch"
SHARDED = "write shard_weights: true at the top level, which shares them out and saves them whole"
NO_COLUMNS = "proteins are no table, and have no columns"
ALL_DONE = "a run always trains and evaluates"
LOGGED = "divergence is seen where the loss is logged: set trainer.logging_steps"

# Served: as it is in transformers, `tests/train/test_options.py` has what is claimed of each.
# A string is the reason why a field is not to be set.
TRAINER_OPTIONS: dict[str, Served | str] = {
    # how long, and how much at a time
    "per_device_train_batch_size": Served(least=1),
    "per_device_eval_batch_size": Served(least=1),
    "gradient_accumulation_steps": Served(least=1),
    "num_train_epochs": Served(above=0),
    "max_steps": Served(least=1, otherwise="Leave it out to train for trainer.num_train_epochs."),
    "auto_find_batch_size": f"with another batch size {RESUMED}",
    # the optimizer
    "learning_rate": Served(least=0),
    "lr_scheduler_type": Served(words=[schedule.value for schedule in SchedulerType]),
    "lr_scheduler_kwargs": Served(),
    "warmup_steps": Served(least=0),
    "optim": Served(words=OPTIMIZERS),
    "optim_args": Served(),
    "optim_target_modules": "every weight is trained in the same way",
    "weight_decay": Served(least=0),
    "adam_beta1": Served(least=0, below=1),
    "adam_beta2": Served(least=0, below=1),
    "adam_epsilon": Served(least=0),
    "max_grad_norm": Served(least=0),
    # the loss
    "label_smoothing_factor": Served(least=0, below=1),
    "neftune_noise_alpha": Served(above=0, otherwise="Leave it out for no noise."),
    "average_tokens_across_devices": (
        "the loss is always the mean over the tokens of all processes, so that two processes "
        "train as one does"
    ),
    "label_names": "the labels of a batch are always called labels",
    # precision, memory and speed
    "bf16": Served(),
    "fp16": Served(),
    "bf16_full_eval": "the evaluation would turn the weights that are saved into bfloat16",
    "fp16_full_eval": "the evaluation would turn the weights that are saved into float16",
    "tf32": Served(),
    "activation_checkpointing": Served(),
    "activation_checkpointing_kwargs": Served(keys=CHECKPOINTING),
    "gradient_checkpointing": Served(),
    "gradient_checkpointing_kwargs": Served(keys=CHECKPOINTING),
    "torch_compile": Served(),
    "torch_compile_backend": Served(words=list_backends()),
    "torch_compile_mode": Served(words=COMPILE_MODES),
    "torch_empty_cache_steps": Served(least=1),
    "use_liger_kernel": "Liger has no kernels for a Performer",
    "liger_kernel_config": "Liger has no kernels for a Performer",
    "use_cache": "a model that trains remembers nothing",
    "use_cpu": Served(),
    "full_determinism": Served(),
    # the data
    "dataloader_num_workers": Served(
        least=0, most=MOST_WORKERS, otherwise="That is 16 processes for each processor there is."
    ),
    "dataloader_prefetch_factor": Served(least=1, most=MOST_PREFETCHED),
    "dataloader_pin_memory": Served(),
    "dataloader_multiprocessing_context": Served(words=("fork", "forkserver", "spawn")),
    "dataloader_drop_last": "evaluations would leave out the last proteins of their sets",
    "dataloader_persistent_workers": "workers that go on would mask the same residues every epoch",
    "dataloader_in_order": RESUMED,
    "train_sampling_strategy": f"in another order than the random one {RESUMED}",
    "length_column_name": NO_COLUMNS,
    "remove_unused_columns": NO_COLUMNS,
    "accelerator_config": f"with batches cut in another way {RESUMED}",
    "ignore_data_skip": "a resumed run goes on with the data where it stopped",
    # what is said while it trains
    "logging_strategy": LOGGED,
    "logging_steps": Served(above=0),
    "logging_first_step": Served(),
    "logging_nan_inf_filter": "a loss that is no number ends the run, and would not be seen",
    "include_num_input_tokens_seen": "tokens are always counted, without padding",
    "log_level": Served(words=LOG_LEVELS),
    "log_level_replica": Served(words=LOG_LEVELS),
    "log_on_each_node": Served(),
    "disable_tqdm": Served(),
    "report_to": Served(words=("none", *TRACKERS)),
    "run_name": "a tracker has the folder of the run as its name",
    "project": REPORTED,
    "trackio_space_id": REPORTED,
    "trackio_bucket_id": REPORTED,
    "trackio_static_space_id": REPORTED,
    "skip_memory_metrics": "the peak of the memory is always measured",
    "debug": "its watchers change what is trained; a run that diverges ends by itself",
    # evaluations
    "eval_strategy": Served(words=("no", "steps", "epoch")),
    "eval_steps": Served(above=0),
    "eval_delay": Served(least=0),
    "eval_on_start": "a resumed run would evaluate once more, where it goes on",
    "prediction_loss_only": METRICS,
    "eval_do_concat_batches": METRICS,
    "eval_use_gather_object": METRICS,
    "eval_accumulation_steps": METRICS,
    "include_for_metrics": METRICS,
    "batch_eval_metrics": METRICS,
    # checkpoints
    "output_dir": "use --output",
    "resume_from_checkpoint": "use --resume",
    "save_strategy": "checkpoints are written every trainer.save_steps steps and at the end",
    "save_steps": Served(above=0),
    "save_total_limit": Served(
        least=2,
        otherwise="While a checkpoint is being written, the one before it is the only whole one.",
    ),
    "save_only_model": "a run is resumed from the optimizer's state as well",
    "save_on_each_node": "a run has one folder, which all nodes see",
    "enable_jit_checkpoint": "a checkpoint without a seal is not resumed from",
    "restore_callback_states_from_checkpoint": "the run restores its own",
    "load_best_model_at_end": LAST_STEP,
    "metric_for_best_model": LAST_STEP,
    "greater_is_better": LAST_STEP,
    "push_to_hub": NOT_PUSHED,
    "hub_token": NOT_PUSHED,
    "hub_private_repo": NOT_PUSHED,
    "hub_model_id": NOT_PUSHED,
    "hub_strategy": NOT_PUSHED,
    "hub_always_push": NOT_PUSHED,
    "hub_revision": NOT_PUSHED,
    # processes
    "seed": "write seed at the top level",
    "data_seed": "write seed at the top level",
    "local_rank": "torchrun says it",
    "ddp_find_unused_parameters": Served(),
    "ddp_bucket_cap_mb": Served(least=1),
    "ddp_broadcast_buffers": Served(),
    "ddp_static_graph": Served(),
    "ddp_backend": "the processes of torchrun use what fits their device",
    "ddp_timeout": Served(least=1),
    "fsdp": SHARDED,
    "fsdp_config": SHARDED,
    "deepspeed": SHARDED,
    "parallelism_config": (
        "write split_sequences, shard_heads or shard_weights at the top level: docs/distributed.md "
        "says what processes then share"
    ),
    "do_train": ALL_DONE,
    "do_eval": ALL_DONE,
    "do_predict": ALL_DONE,
}


# Field → why a run does not take it.
REFUSED_OPTIONS: dict[str, str] = {
    entry.name: row
    for entry in fields(TrainingArguments)
    if isinstance(row := TRAINER_OPTIONS.get(entry.name, UNKNOWN), str)
}


def check_arguments(arguments: TrainingArguments) -> None:
    """Make the optimizer and the learning rates of one weight: what is wrong is found before work.

    Raises ValueError for what torch or transformers refuse.
    """
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError(
            "trainer.fp16 needs an accelerator, and this run is on the CPU. Take bf16."
        )
    if arguments.dataloader_multiprocessing_context and not arguments.dataloader_num_workers:
        raise ValueError(
            "trainer.dataloader_multiprocessing_context says how workers start, and "
            "trainer.dataloader_num_workers is 0. Set both, or neither."
        )
    for tracker in TRACKERS:
        if tracker in arguments.report_to and importlib.util.find_spec(tracker) is None:
            raise ValueError(
                f"trainer.report_to={tracker} needs the package {tracker}, which is not installed. "
                f"Install it: pip install {tracker}"
            )
    optimizer, schedule = arguments.optim.value, arguments.lr_scheduler_type.value
    for word in (arguments.optim_args or "").replace(" ", "").split(","):
        if word and word.partition("=")[0] not in OPTIMIZERS[optimizer]:
            raise ValueError(
                f"trainer.optim_args must be key=value,... with keys in {OPTIMIZERS[optimizer]} "
                f"for trainer.optim={optimizer}, got {word!r}. Adam's numbers have fields of "
                "their own, as weight_decay has."
            )
    if schedule.startswith("constant") and arguments.lr_scheduler_kwargs:
        raise ValueError(
            f"trainer.lr_scheduler_type={schedule} takes no trainer.lr_scheduler_kwargs, got "
            f"{arguments.lr_scheduler_kwargs}. Leave them out."
        )
    if schedule == "constant" and arguments.warmup_steps:
        raise ValueError(
            "trainer.lr_scheduler_type=constant takes no trainer.warmup_steps, got "
            f"{arguments.warmup_steps:g}. Write constant_with_warmup."
        )
    weight = nn.Linear(1, 1)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, weight)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer_class(weight.parameters(), **options),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(
            f"trainer.optim={optimizer} with optim_args={arguments.optim_args}, or "
            f"trainer.lr_scheduler_type={schedule} with lr_scheduler_kwargs="
            f"{arguments.lr_scheduler_kwargs}, cannot be made: {error}. Correct these."
        ) from error
