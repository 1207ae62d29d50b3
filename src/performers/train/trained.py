"""What a run has left to be used: a Performer, or a converted model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from performers.convert.linearize import load_linearized
from performers.convert.options import FAVOR
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.data.vocabulary import VOCAB_SIZE
from performers.records.files import read_json
from performers.train.checkpoints import load_model
from performers.train.fine_tuning_task import fine_tuning_task
from performers.train.tasks import TASKS, Model, Task
from performers.train.texts import task_of_text

__all__ = ["Trained", "load_of_proteins"]


def load_of_proteins(checkpoint: Path) -> tuple[Model, str]:
    """`load_model`, of one that reads proteins. Raises ValueError for another vocabulary, too."""
    model, task = load_model(checkpoint)
    if model.config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{checkpoint} must hold a model of proteins, which has {VOCAB_SIZE} tokens, and has "
            f"{model.config.vocab_size}. Score text with performers evaluate, or go on with it by "
            "performers generate."
        )
    return model, task


@dataclass(frozen=True)
class Trained:
    """A model, the name of its task, and the tokenizer of one that reads text, not proteins."""

    model: PreTrainedModel
    name: str
    tokenizer: Any = None

    @classmethod
    def load(cls, checkpoint: Path) -> Trained:
        """From a run, its model/, one of its checkpoints, or what `performers convert` wrote.

        Raises FileNotFoundError if there is none, ValueError for another model, and for one without
        a head for a task.
        """
        folder = checkpoint / "model" if (checkpoint / "model").is_dir() else checkpoint
        path = folder / "config.json"
        reads_text = (folder / "tokenizer_config.json").is_file()
        if not path.is_file() or FAVOR not in read_json(path, remedy="Save the model anew."):
            own = load_model(checkpoint)
            return cls(*own, source_tokenizer(folder) if reads_text else None)
        config = source_config(folder)
        kind = fine_tuning_task(config)
        if kind.name not in TASKS:
            raise ValueError(
                f"{folder} must hold a masked or a causal language model, and holds an {kind.name} "
                "without a head, which predicts nothing. Save it with its head."
            )
        check_source_weights(folder)
        tokenizer = None
        if reads_text or config.vocab_size != VOCAB_SIZE:
            tokenizer = source_tokenizer(folder)
        return cls(load_linearized(kind.auto_class, folder).eval(), kind.name, tokenizer)

    @property
    def task(self) -> Task:
        return (
            TASKS[self.name] if self.tokenizer is None else task_of_text(self.name, self.tokenizer)
        )
