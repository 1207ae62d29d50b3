"""A training run: a folder of files, which can be resumed after an interruption at any moment.

runs/demo/
├── config.yaml          the run, every key resolved
├── environment.json     versions and hardware
├── checkpoints/         the last two; only whole ones are resumed from
├── tensorboard/
├── model/               the trained model, for from_pretrained
├── attention.npz        its attention matrices of one protein
├── result.json          what it reached
├── compare/exact/…      the same five of each model that it is compared with
└── metrics.json         all numbers of the run; the report is drawn from them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch.optim import AdamW
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import TensorBoardCallback

from performers.checks import check_count
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.data.baseline import EmpiricalBaseline
from performers.data.proteins import SPLITS
from performers.data.tokens import TokenDataset
from performers.models import PerformerConfig
from performers.records.environment import describe_environment
from performers.records.files import holding, read_json
from performers.train.attention import save_attention_maps
from performers.train.byte_tokenizer import byte_tokenizer
from performers.train.checkpoints import (
    check_weights,
    last_whole_checkpoint,
    saving,
    steps_of,
    working_in,
    write_atomically,
)
from performers.train.config import RunConfig, read_yaml
from performers.train.data import Splits, read_data
from performers.train.folders import check_place, claim, holds_nothing, release
from performers.train.layout import Layout
from performers.train.lost import naming_lost_processes
from performers.train.options import check_arguments
from performers.train.pretrained import build_pretrained, check_blocks, dropouts
from performers.train.shares import LAID_OUT, SHARED_OUT, Shares, check_shares
from performers.train.tasks import (
    TASKS,
    Task,
    build_model,
    check_size,
    model_config,
    unloaded_model,
)
from performers.train.texts import Texts, read_held_out, task_of_text
from performers.train.trainer import TokenTrainer, train_to_the_end, training_arguments

__all__ = ["Run", "has_finished", "holds_run"]

RESCORED = "Delete it: with --resume the model is scored again, from its last checkpoint."

TITLES = {
    "valid": "Validation, clusters held out",
    "test": "Test, clusters held out",
    "ood": "Out of distribution, families held out",
}
TITLES_OF_TEXT = {"valid": "Validation, text held out", "test": "Test, text held out"}


def holds_run(folder: Path) -> bool:
    """True if a run was ever started in the folder."""
    return (folder / "config.yaml").exists()


def has_finished(folder: Path) -> bool:
    """True if the run in the folder has all its numbers."""
    return (folder / "metrics.json").exists()


@dataclass(frozen=True)
class Run:
    """A run that has passed every check and has its data; `train` does the work.

    `tokenizer`: that of a model which reads text.
    """

    config: RunConfig
    folder: Path
    data: Splits | Texts
    device: torch.device
    environment: dict[str, Any]
    tokenizer: Any = None

    @property
    def is_main_process(self) -> bool:
        """True in the one process, of those that torchrun started, that writes files."""
        return PartialState().is_main_process

    @classmethod
    def prepare(cls, config: RunConfig, folder: Path, resume: bool = False) -> Run:
        """Check everything that can be checked before training; creates the folder.

        Raises ValueError, TypeError or FileNotFoundError for a config, data, a folder or
        checkpoints that cannot be used, and FileExistsError for a folder that holds a run
        although `resume` is not set.
        """
        configs = _configs(config)
        for one in configs.values():
            check_size(one)
        arguments = training_arguments(config, folder)
        check_arguments(arguments)
        layout = Layout.of(config, arguments.world_size)
        for one in configs.values():
            layout.check(one)
        _check_folder(config, folder, resume)
        environment = _environment(arguments)
        for name, one in configs.items():
            place = _place(folder, config, name)
            if (place / "result.json").exists():
                _read_result(place / "result.json")
            checkpoint = last_whole_checkpoint(place / "checkpoints")
            if checkpoint is not None:
                steps_of(checkpoint)
                check_weights(checkpoint, unloaded_model(one))
        data, tokenizer = _read(config, arguments.dataloader_num_workers)
        sequences = len(data.train) if isinstance(data.train, TokenDataset) else None
        _check_shares(config, folder, environment, sequences)
        # Asking for the device starts the process group of torchrun. The barrier then makes every
        # rank look at the folder before any rank writes into it.
        device = arguments.device
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            claim(folder)
            write_atomically(folder / "config.yaml", config.to_yaml())  # what makes it a run
            write_atomically(folder / "environment.json", _json(environment))
        state.wait_for_everyone()
        return cls(config, folder, data, device, environment, tokenizer)

    @property
    def task(self) -> Task:
        """What is scored, and how batches are made."""
        if self.tokenizer is None:
            return TASKS[self.config.task]
        return task_of_text(self.config.task, self.tokenizer)

    def build(self, config: RunConfig) -> PreTrainedModel:
        """The model before its first step."""
        if config.pretrained is None:
            return build_model(config)
        return build_pretrained(config.pretrained, iter(self.data.train), self.device)

    def train(self) -> dict[str, Any] | None:
        """Train the model and those it is compared with; writes and returns the metrics.

        Under torchrun only the first process has them; the others return None. After an
        interruption at any moment, a run prepared with `resume=True` continues from the last whole
        checkpoint and ends with the same numbers. A run of `max_seconds` ends after the same time
        of training instead.

        Raises LostProcessError where another process has ended.
        """
        self._warm_up()
        with naming_lost_processes(), working_in(self.folder):
            models = [
                self._train_model(one, _place(self.folder, self.config, name))
                for name, one in _configs(self.config).items()
            ]
        if not self.is_main_process:
            return None
        metrics = {
            "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "config": self.config.to_dict(),
            "environment": self.environment,
            "data": self._describe_data(),
            "baseline": self._evaluate_baseline(),
            "models": models,
        }
        write_atomically(self.folder / "metrics.json", _json(metrics))
        release(self.folder)
        return metrics

    def _warm_up(self) -> None:
        """Take one step with small models that are thrown away.

        Otherwise the time and memory that torch and the Trainer need once, when a process first
        trains, and first with a mechanism, would be counted for the first model.
        """
        batch = self.task.collator(self.config.seed)([next(iter(self.data.train))])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        for model in self._small_models():
            model.to(self.device)(**batch).loss.backward()
            AdamW(model.parameters()).step()
        TensorBoardCallback()

    def _small_models(self) -> Iterator[PreTrainedModel]:
        """Of one layer, with each mechanism of the run."""
        if self.config.pretrained is None:
            for config in _configs(self.config).values():
                attention = config.model["attention"]
                first = attention[0] if isinstance(attention, list) else attention
                own = {**config.model, "num_hidden_layers": 1, "attention": first}
                yield build_model(replace(config, model=own))
        else:
            vocabulary = {"vocab_size": self.data.train.vocab_size, "pad_token_id": None}
            yield self.task.model(
                PerformerConfig(num_hidden_layers=1, attention="identity", **vocabulary)
            )

    def _train_model(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        """Train one model to its end and score it, or read the result of an earlier attempt."""
        result = folder / "result.json"
        if not result.exists():
            trainer = train_to_the_end(
                config,
                folder,
                lambda: self.build(config),
                self.data.train,
                self.data.valid,
                self.task,
            )
            outcome = self._score(config, trainer, folder) | {
                "peak_memory": trainer.peak_memory,
                "resident_memory": trainer.resident_memory,
            }
            if self.is_main_process:
                write_atomically(result, _json(outcome))
            PartialState().wait_for_everyone()
        return _read_result(result)

    def _score(self, config: RunConfig, trainer: TokenTrainer, folder: Path) -> dict[str, Any]:
        """Evaluate and save the model of the last checkpoint.

        Everything follows from that checkpoint, so that this can be interrupted and repeated as
        well.
        """
        model = trainer.accelerator.unwrap_model(trainer.model)
        state, seconds = trainer.state, trainer.clock.seconds
        tokens = state.num_input_tokens_seen
        history = list(state.log_history)  # the evaluations below add to it
        outcome = {
            "attention": config.attention,
            "parameters": model.num_parameters(),
            "device": str(self.device),
            "steps": state.global_step,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "metrics": {
                name: _without_prefix(trainer.evaluate(split, metric_key_prefix=name), name)
                for name, split in self._evaluated()
            },
            "history": history,
        }
        if self.is_main_process:
            shutil.rmtree(folder / "model", ignore_errors=True)
            with saving(folder / "model"):
                model.save_pretrained(folder / "model")
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder / "model")
            if self.tokenizer is None and config.pretrained is None:
                with saving(folder / "attention.npz"):
                    protein = save_attention_maps(model, folder / "attention.npz")
                file = (folder / "attention.npz").relative_to(self.folder).as_posix()
                outcome["attention_maps"] = {"file": file, "protein": protein}
        return outcome

    def _evaluated(self) -> Iterator[tuple[str, TokenDataset]]:
        """The splits to evaluate on: all that are not empty, except the training set."""
        for name in SPLITS[1:]:
            split: TokenDataset = getattr(self.data, name)
            if len(split):
                yield name, split

    def _evaluate_baseline(self) -> dict[str, dict[str, float]]:
        collator = self.task.evaluation_collator(self.config.seed)
        baseline = EmpiricalBaseline.fit(self.data.train, collator.scored_token_ids)
        return {name: baseline.evaluate(split, collator) for name, split in self._evaluated()}

    def _describe_data(self) -> dict[str, Any]:
        titles = TITLES if self.config.data.text is None else TITLES_OF_TEXT
        return {
            "description": self.data.description(self.config.data.files),
            "splits": {
                name: {"title": titles[name], "sequences": len(split)}
                for name, split in self._evaluated()
            },
            **self.data.summary(),
        }


def _configs(config: RunConfig) -> dict[str, RunConfig]:
    """The run's own model and those of `compare`, each checked, by mechanism."""
    names = dict.fromkeys([config.attention, *config.compare])
    configs = {name: config.with_attention(name) for name in names}
    for one in configs.values():
        if one.pretrained is None:
            model_config(one)
    return configs


def _read_result(path: Path) -> dict[str, Any]:
    """What one model reached, from its file. Raises DamagedFileError."""
    result = read_json(path, RESCORED)
    with holding(path, "what a model reached", RESCORED):
        for name in ("attention", "parameters", "steps", "tokens", "seconds", "history"):
            result[name]
        for scores in result["metrics"].values():
            float(scores["accuracy"])
    return result


def _read(config: RunConfig, num_workers: int) -> tuple[Splits | Texts, Any]:
    """What is trained on, and the tokenizer of a model that reads text."""
    if config.pretrained is None:
        if config.data.text is None:
            return read_data(config.data, config.seed, num_workers), None
        tokenizer = byte_tokenizer()
        return read_held_out(config.data, tokenizer, len(tokenizer), config.seed), tokenizer
    check_source_weights(config.pretrained.model)
    if config.data.text is None:
        data: Splits | Texts = read_data(config.data, config.seed, num_workers)
        tokenizer = None
    else:
        tokenizer = source_tokenizer(config.pretrained.model)
        size = source_config(config.pretrained.model).vocab_size
        data = read_held_out(config.data, tokenizer, size, config.seed)
        task_of_text(config.task, tokenizer)
    if isinstance(data.train, TokenDataset):
        check_blocks(config.pretrained, max(data.train.lengths), config.data.files)
    return data, tokenizer


def _place(folder: Path, config: RunConfig, name: str) -> Path:
    """The folder of one model's files. The run's own model has the folder of the run."""
    return folder if name == config.attention else folder / "compare" / name


def _check_folder(config: RunConfig, folder: Path, resume: bool) -> None:
    check_place(folder)
    if not holds_run(folder):
        if not holds_nothing(folder):
            raise FileExistsError(
                f"the output folder {folder} holds something that is not a run. Choose an empty or "
                "a new one with --output."
            )
        return
    if not resume:
        raise FileExistsError(
            f"the output folder {folder} already holds a run. Add --resume to go on with it, or "
            "choose another folder with --output."
        )
    written = read_yaml(folder / "config.yaml")
    if not isinstance(written, dict):
        raise ValueError(
            f"{folder / 'config.yaml'} must be the config of the run, got "
            f"{type(written).__name__}. Write it anew, or choose another folder with --output."
        )
    saved = _flat(written)
    given = _flat(yaml.safe_load(config.to_yaml()))
    # `_check_shares` is about the former, and checkpoints hold whole weights.
    shared_out = {f"trainer.{key}" for key in SHARED_OUT} | set(LAID_OUT)
    for key in sorted((saved.keys() | given.keys()) - shared_out):
        if saved.get(key) != given.get(key):
            raise ValueError(
                f"the run in {folder} does not match the config: {key} was "
                f"{saved.get(key, 'not set')!r} and is {given.get(key, 'not set')!r}. Resume with "
                f"the config {folder / 'config.yaml'}, or choose another folder with --output."
            )


def _environment(arguments: TrainingArguments) -> dict[str, Any]:
    """On what the run is made, and by how many processes and devices."""
    return describe_environment() | {
        "processes": arguments.world_size,
        "devices_per_process": max(1, arguments.n_gpu),
    }


def _check_shares(
    config: RunConfig, folder: Path, environment: Mapping[str, Any], sequences: int | None
) -> None:
    """Refuse to go on by as many processes that the run would end with other numbers."""
    path = folder / "environment.json"
    if not path.exists():
        return
    remedy = "Delete it if the run is gone on with by as many processes as before."
    saved = read_json(path, remedy)
    with holding(path, "how many processes and devices made the run", remedy):
        for name in ("processes", "devices_per_process"):
            check_count(name, saved[name])
    before = read_yaml(folder / "config.yaml")
    draws = {"trainer.neftune_noise_alpha": config.trainer.get("neftune_noise_alpha") or 0.0}
    if config.pretrained is None:
        draws["model.hidden_dropout_prob"] = model_config(config).hidden_dropout_prob
    else:
        draws |= dropouts(config.pretrained)
    now = Shares.of(config.to_dict(), environment)
    check_shares(Shares.of(before, saved), now, draws, sequences)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a tree."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _without_prefix(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The paper's metrics of one evaluation, without the Trainer's own timings."""
    names = ("accuracy", "loss", "perplexity", "bits_per_character", "num_scored")
    return {name: metrics[f"{prefix}_{name}"] for name in names}


def _json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2) + "\n"
