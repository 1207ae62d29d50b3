"""Which checkpoints are complete, and which fit the model that is to load them.

The Trainer writes a checkpoint file by file into its final place, so after a kill the newest
folder may be a fragment. A checkpoint here is whole once it holds a seal, written last and in one
step, that lists every file with its size.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from performers.models import PerformerConfig
from performers.records.files import (
    FAULTS,
    DamagedFileError,
    UnsavedError,
    holding,
    read_json,
    replace_text,
    writing,
)
from performers.train.clock import TrainingClock
from performers.train.tasks import TASKS, Model

__all__ = [
    "SealCheckpoints",
    "UnsavedError",
    "check_weights",
    "is_whole",
    "last_whole_checkpoint",
    "load_model",
    "loading_state",
    "remove_fragments",
    "saving",
    "seconds_until",
    "steps_of",
    "working_in",
    "write_atomically",
]

SEAL = "whole.json"

RESUME = "go on with --resume. Every whole checkpoint is kept."

# How the system says that nothing more can be written.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SealCheckpoints(TrainerCallback):
    """Seals every checkpoint when all ranks have written theirs, with the seconds of the clock."""

    def __init__(self, clock: TrainingClock) -> None:
        self.clock = clock

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            sizes.pop(SEAL, None)
            seal = {"seconds": self.clock.seconds, "files": sizes}
            write_atomically(folder / SEAL, json.dumps(seal, indent=1))


def saving(path: Path, then: str = RESUME) -> AbstractContextManager[None]:
    """`writing`, where torch or safetensors write `path`. Raises UnsavedError."""
    return writing(path, then, (OSError, RuntimeError, SafetensorError))


@contextmanager
def loading_state(checkpoint: str | None) -> Iterator[None]:
    """Where what torch saved beside the weights is loaded. Raises DamagedFileError."""
    try:
        yield
    except (UnpicklingError, RuntimeError, *FAULTS) as error:
        reason = str(error).partition(". ")[0]
        raise DamagedFileError(
            f"{checkpoint} must hold what the optimizer, its schedule and the generators remember, "
            f"and a file of it is damaged: {reason}. Delete this folder, and go on from the "
            "checkpoint before it with --resume."
        ) from error


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Where libraries write below a folder by themselves: of a full disk it is said that a run can
    go on. Other errors pass.

    Raises UnsavedError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, UnsavedError) or error.errno not in FULL:
            raise
        with saving(Path(error.filename or folder)):
            raise


def write_atomically(path: Path, text: str) -> None:
    """`replace_text`, for what a run is to keep. Raises UnsavedError."""
    replace_text(path, text, RESUME)


def is_whole(checkpoint: Path) -> bool:
    """True if every file that the seal lists is there, with its full size. A damaged seal proves
    nothing."""
    try:
        seal = read_json(checkpoint / SEAL, remedy="")
        return float(seal["seconds"]) >= 0 and all(
            (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size
            for name, size in seal["files"].items()
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return False


def seconds_until(checkpoint: Path) -> float:
    """Seconds of optimizer steps up to a whole checkpoint, from its seal."""
    return float(read_json(checkpoint / SEAL, remedy="")["seconds"])


def steps_of(checkpoint: Path) -> tuple[int, int]:
    """How many optimizer steps lead to a whole checkpoint, and of how many in all."""
    path = checkpoint / "trainer_state.json"
    remedy = f"Delete {checkpoint} and resume from the checkpoint before it, with --resume."
    state = read_json(path, remedy)
    with holding(path, "the state of a Trainer", remedy):
        return int(state["global_step"]), int(state["max_steps"])


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step; None if there is none."""
    whole = [checkpoint for checkpoint in _checkpoints(folder) if is_whole(checkpoint)]
    return max(whole, key=_step, default=None)


def remove_fragments(folder: Path) -> list[str]:
    """Delete checkpoints that are not whole, and return their names."""
    fragments = [checkpoint for checkpoint in _checkpoints(folder) if not is_whole(checkpoint)]
    for fragment in fragments:
        shutil.rmtree(fragment)
    return [fragment.name for fragment in fragments]


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Refuse a checkpoint whose weights are not exactly those of the model, by name and shape.

    Reads only the header of the file. transformers would fill in missing weights at random.
    """
    path = checkpoint / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"{checkpoint} must hold a model.safetensors, as `performers train` writes it in the "
            "model/ folder of a run. Give that folder, or that of the run."
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged and cannot be loaded: {error}.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shared = _shared_names(model)
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name) and not (name in shared and name not in saved):
            raise ValueError(
                f"the checkpoint {checkpoint} does not match its config: {name} is "
                f"{saved.get(name, 'absent')} in the checkpoint and "
                f"{expected.get(name, 'absent')} in the model of the config."
            )


def load_model(checkpoint: Path) -> tuple[Model, str]:
    """The model in a folder (a run, its model/ or one of its checkpoints/), and its task.

    Raises FileNotFoundError if there is none, ValueError if its weights and config disagree.
    """
    folder = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
    path = folder / "config.json"
    try:
        config = read_json(path, remedy="Take that of a checkpoint of the run, or save it anew.")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{checkpoint} must be a run with a finished model/, or a folder that "
            "save_pretrained wrote: it has no config.json."
        ) from error
    named = {task.model.__name__: name for name, task in TASKS.items()}
    architectures = config.get("architectures")
    architecture = (
        str(architectures[0]) if isinstance(architectures, list) and architectures else "nothing"
    )
    if architecture not in named:
        raise ValueError(f"{folder} must hold one of {sorted(named)}, but holds {architecture}.")
    task = named[architecture]
    try:
        model_config = PerformerConfig.from_pretrained(folder)
    except (ValueError, TypeError, LookupError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{path} describes no Performer: {error}") from error
    with torch.device("meta"):
        check_weights(folder, TASKS[task].model(model_config))
    return TASKS[task].model.from_pretrained(folder).eval(), task


def _shared_names(model: nn.Module) -> set[str]:
    """Names of tensors that are the same memory as another: saved once, under one name."""
    by_memory: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_memory.setdefault(id(tensor), []).append(name)
    return {name for names in by_memory.values() if len(names) > 1 for name in names}


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and _step(path) >= 0]


def _step(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1
