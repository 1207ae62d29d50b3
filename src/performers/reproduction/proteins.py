"""Models of proteins that train for the same time, for experiments that compare mechanisms."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from performers.data.baseline import EmpiricalBaseline
from performers.data.proteins import SPLITS, load_proteins
from performers.data.tokens import TokenDataset
from performers.train.config import PAPER_ARGUMENTS, RunConfig
from performers.train.tasks import TASKS, Task, build_model
from performers.train.trainer import (
    TokenTrainer,
    train_to_the_end,
    training_arguments,
    without_needless_mask,
)

__all__ = ["CURVES", "Proteins", "timed_run"]

# Batches are as long as a multiple of this: an accelerator sees few shapes, and exact attention
# takes masks of such sizes as they are.
LENGTH_UNIT = 64

# What is scored while a model trains, on parts of equal size.
CURVES = ("train", "valid")

METRICS = ("accuracy", "perplexity")


@dataclass(frozen=True)
class Proteins:
    """What models train on, and by the names of the splits what they are scored on.

    `scored`: of each split that is not empty the first sequences in the order of a hash; those of
    "train" are among what is trained on. `seed`: decides at which positions all models are scored,
    whatever their own seeds are.
    """

    train: TokenDataset
    scored: dict[str, TokenDataset]
    seed: int

    @classmethod
    def read(
        cls,
        source: str,
        length: int,
        num_scored: int,
        fractions: Mapping[str, float],
        concatenate: bool = False,
        seed: int = 0,
    ) -> Proteins:
        """`num_scored`: how many sequences of a split at most. Else see `load_proteins`, of which
        `fractions` has "valid", "test" and "ood". As in the paper the first two are single
        proteins, chosen at random, and the last is whole families.
        """
        splits = load_proteins(
            source,
            length=length,
            concatenate=concatenate,
            split_by="sequence",
            valid_fraction=fractions.get("valid", 0.0),
            test_fraction=fractions.get("test", 0.0),
            ood_fraction=fractions.get("ood", 0.0),
            seed=seed,
        )
        sets: dict[str, TokenDataset] = {name: getattr(splits, name) for name in SPLITS}
        return cls(
            splits.train,
            {
                name: split.chosen(range(min(num_scored, len(split))))
                for name, split in sets.items()
                if len(split)
            },
            seed,
        )

    def counts(self) -> dict[str, int]:
        """Sequences and tokens that are trained on, and sequences that are scored."""
        return {
            "sequences": len(self.train),
            "tokens": len(self.train.tokens),
            **{f"scored {name}": len(split) for name, split in self.scored.items()},
        }

    def baseline(self, task: str) -> dict[str, dict[str, float]]:
        """The empirical baseline at the positions where models are scored."""
        collator = _task(task, self.seed).evaluation_collator(self.seed)
        fitted = EmpiricalBaseline.fit(self.train, collator.scored_token_ids)
        return {name: fitted.evaluate(split, collator) for name, split in self.scored.items()}

    def measured(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        """The `outcome` of a model that trains now, or is trained on in `folder`."""
        return self.outcome(self.train_model(config, folder))

    def train_model(self, config: RunConfig, folder: Path) -> TokenTrainer:
        """Train to the end of the time; an interrupted training in `folder` is continued."""
        task = _task(config.task, self.seed)
        if not (folder / "checkpoints").exists():
            self._warm_up(config, task)
        return train_to_the_end(
            config,
            folder,
            lambda: build_model(config),
            self.train,
            {name: self.scored[name] for name in CURVES},
            task,
        )

    def _warm_up(self, config: RunConfig, task: Task) -> None:
        """Go forward and back with batches of all lengths, by a model that is thrown away.

        Otherwise the first models would pay for what torch needs once, and some for the compilation
        of their kernels.
        """
        by_length = {-(-length // LENGTH_UNIT): i for i, length in enumerate(self.train.lengths)}
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(config, Path(folder))
        model = build_model(config).to(arguments.device)
        collator = task.collator(config.seed)
        for index in by_length.values():
            rows = [self.train[index]] * 2
            batch = without_needless_mask(collator(rows), task)
            batch = {name: x.to(arguments.device) for name, x in batch.items()}
            with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                loss = model(**batch).loss
            loss.backward()

    def outcome(self, trainer: TokenTrainer) -> dict[str, Any]:
        """What a trained model cost and reached, while it trained and at its end.

        "curves": of each of `CURVES` (seconds, accuracy, perplexity) at each evaluation. "scores":
        accuracy and perplexity on each of the `scored` sets.
        """
        history = list(trainer.state.log_history)  # the evaluations below add to it
        curves = {
            name: [
                [entry["seconds"], *(entry[f"eval_{name}_{metric}"] for metric in METRICS)]
                for entry in history
                if f"eval_{name}_accuracy" in entry
            ]
            for name in CURVES
        }
        scores = {}
        for name, split in self.scored.items():
            found = trainer.evaluate(split, metric_key_prefix=name)
            scores[name] = {metric: found[f"{name}_{metric}"] for metric in METRICS}
        return {
            "parameters": trainer.model.num_parameters(),
            "steps": trainer.state.global_step,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": trainer.clock.seconds,
            "curves": curves,
            "scores": scores,
        }


def timed_run(
    task: str,
    model: Mapping[str, Any],
    seconds: float,
    *,
    batch_size: int,
    evaluations: int,
    learning_rate: float,
    redraw_every: int,
    bf16: bool,
    workers: int,
    seed: int,
) -> RunConfig:
    """A run of so many seconds with the paper's hyperparameters (Appendix A.2), but for a learning
    rate that rises in the first twentieth of the time and then falls to 0.

    `evaluations`: how often it is scored while it trains, the end included.
    """
    return RunConfig(
        task=task,
        seed=seed,
        redraw_every=redraw_every,
        max_seconds=seconds,
        model=dict(model),
        trainer={
            **PAPER_ARGUMENTS,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.05,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "train_sampling_strategy": "group_by_length",
            "dataloader_num_workers": workers,
            "bf16": bf16,
            "use_cpu": not torch.cuda.is_available(),  # bf16 must be told
            "eval_strategy": "steps",
            "eval_steps": 1 / evaluations,
            "logging_steps": 1 / evaluations,
            "save_steps": 0.5,
            "save_total_limit": 2,
            "disable_tqdm": True,
        },
    )


def _task(name: str, scoring_seed: int) -> Task:
    """A task whose batches have few lengths, and whose models are scored at the same positions."""
    task = TASKS[name]
    collator = replace(task.evaluation_collator(scoring_seed), pad_to_multiple_of=LENGTH_UNIT)
    return replace(
        task,
        collator=lambda seed: replace(task.collator(seed), pad_to_multiple_of=LENGTH_UNIT),
        evaluation_collator=lambda seed: collator,
    )
