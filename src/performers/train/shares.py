"""How the sequences of a step are shared out over processes, and when a run may be shared out anew.

A resumed run ends with the same numbers. On another number of processes it does, up to rounding, if
a step has the same sequences and nothing is drawn at random for each process by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

__all__ = ["LAID_OUT", "SHARED_OUT", "Shares", "check_shares"]

# Keys of the section `trainer` that may change if their product with the processes does not.
SHARED_OUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
# Keys of a config that say how processes share the work; the numbers do not depend on them.
LAID_OUT = ("shard_weights", "shard_heads", "split_sequences")


@dataclass(frozen=True)
class Shares:
    """Processes, devices of each, sequences of each of these at a time, and how often in a step;
    how many processes share a sequence, and how many the heads.
    """

    processes: int
    devices_per_process: int
    batch: int
    accumulation: int
    pieces: int = 1
    heads: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Shares:
        """Those of a run of this config, on what it is or was made."""
        trainer = config["trainer"]
        batch, accumulation = (
            int(trainer.get(key, getattr(TrainingArguments, key))) for key in SHARED_OUT
        )
        processes, devices = (
            int(environment.get(key, 1)) for key in ("processes", "devices_per_process")
        )
        pieces, heads = (int(config.get(key, 1)) for key in ("split_sequences", "shard_heads"))
        return cls(processes, devices, batch, accumulation, pieces, heads)

    @property
    def groups(self) -> int:
        """Processes that have sequences of their own, or groups of them."""
        return self.processes // (self.pieces * self.heads)

    @property
    def at_once(self) -> int:
        return self.groups * self.devices_per_process * self.batch

    @property
    def of_step(self) -> int:
        return self.at_once * self.accumulation

    def of_epoch(self, sequences: int | None) -> int | None:
        """Several processes fill up the last batch with sequences from the beginning. A stream has
        no last one, and None sequences.
        """
        if sequences is None or self.groups == 1:
            return sequences
        return -(-sequences // self.at_once) * self.at_once

    def __str__(self) -> str:
        shared = f"split_sequences={self.pieces} · " if self.pieces > 1 else ""
        shared += f"shard_heads={self.heads} · " if self.heads > 1 else ""
        return (
            f"{self.processes} processes · {self.devices_per_process} devices per process · "
            f"{shared}per_device_train_batch_size={self.batch} · "
            f"gradient_accumulation_steps={self.accumulation}"
        )


def check_shares(
    before: Shares, now: Shares, draws: Mapping[str, float], sequences: int | None
) -> None:
    """Refuse to share out the steps of a run anew where that would change its numbers.

    `draws`: options that make each process draw numbers of its own if they are not 0.
    `sequences`: those of an epoch; None of a stream.

    Raises ValueError that says what would change.
    """
    if before == now:
        return
    if before.of_step != now.of_step:
        change = f"a step would be of {now.of_step} sequences, and was of {before.of_step}"
        remedy = (
            f"Set trainer.per_device_train_batch_size and trainer.gradient_accumulation_steps so "
            f"that a step is of {before.of_step}"
        )
    elif drawing := [name for name, rate in draws.items() if rate]:
        change = f"each process draws by itself for {', '.join(drawing)}"
        remedy = "Go on with what it was started on"
    elif before.of_epoch(sequences) != now.of_epoch(sequences):
        change = (
            f"several processes fill up the last batch of an epoch of {sequences} sequences: it "
            f"would be of {now.of_epoch(sequences)}, and was of {before.of_epoch(sequences)}"
        )
        remedy = "Take another number of processes, or go on with what it was started on"
    else:
        return
    raise ValueError(
        f"the run cannot be gone on with on {now}, because it was on {before}, and {change}. "
        f"{remedy}, or choose another folder with --output."
    )
