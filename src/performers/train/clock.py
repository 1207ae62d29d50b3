"""Training for a given time: a clock for optimizer steps, and a learning rate that follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from time import perf_counter, process_time
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import (
    IntervalStrategy,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

__all__ = ["NEVER", "SCHEDULES", "TrainingClock", "learning_rate_factor", "time_on"]

# A number of steps that no run reaches.
NEVER = 10**12

# The learning rate ÷ its peak, as a function of the share of the time after the warmup.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "constant_with_warmup": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2,
}


def learning_rate_factor(schedule: str, warmup: float, share: float) -> float:
    """The learning rate ÷ its peak when `share` of the time is used, `warmup` of it to rise.

    share/warmup before the warmup has ended, then `SCHEDULES[schedule]` of what is left of the
    time: the schedules of transformers, with time in the place of steps.

    >>> [learning_rate_factor("linear", 0.2, share) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if share < warmup:
        return share / warmup
    return SCHEDULES[schedule]((share - warmup) / (1 - warmup))


class TrainingClock(TrainerCallback):
    """Counts the seconds of the optimizer steps, and ends a training that has used `limit` of them.

    Seconds are those of `time_on`; evaluations, checkpoints and the loading of data are not
    counted. `seconds`: used so far; the seal of a checkpoint keeps them, so that a resumed run
    counts on. A step that has begun when the time runs out is finished, so that a model may use up
    to one step more than `limit`.
    `shares`: what the Trainer is to do (a field of `TrainerControl`) whenever such a share of the
    limit has passed, at the step that ends next.

    The processes of torchrun all use the clock of the first, so that they stop at the same step.
    """

    def __init__(
        self,
        seconds: float = 0.0,
        limit: float | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        self.seconds = seconds
        self.limit = limit
        self.shares = dict(shares or {})
        self._started = 0.0
        self._share_before = self.share

    @property
    def share(self) -> float:
        """The share of the limit that is used, at most 1; 0 without a limit."""
        return 0.0 if self.limit is None else min(self.seconds / self.limit, 1.0)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._started = time_on(args.device)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # This is not done at the end of the step, because the learning rate of the next step is set
        # before that.
        self._share_before = self.share
        self.seconds += time_on(args.device) - self._started
        if self.limit is not None and PartialState().num_processes > 1:
            first = torch.tensor(self.seconds, dtype=torch.float64, device=args.device)
            self.seconds = float(broadcast(first))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        for action, share in self.shares.items():
            if self.share // share > self._share_before // share:
                setattr(control, action, True)
        if self.share == 1.0:
            control.should_training_stop = control.should_log = control.should_save = True
            control.should_evaluate = args.eval_strategy == IntervalStrategy.STEPS


def time_on(device: torch.device) -> float:
    """The time in seconds when a device has done all that it was given.

    An accelerator works on while the process goes on: without waiting, what it does while the next
    batch is loaded would not be counted. On a CPU with one process of one thread it is the time of
    the processor, which other programs on the machine do not lengthen; else that of a wall clock.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1 and PartialState().num_processes == 1:
        return process_time()
    return perf_counter()
