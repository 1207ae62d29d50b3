"""A run that starts from a model folder of transformers, and trains it with FAVOR+ for attention.

    pretrained: {model: path/to/llama, options: {window_size: 64}}     an exact model is converted
    pretrained: {model: converted}                                     one that was goes on as it is

The words are those of `ConversionConfig`, and the options those of `FavorOptions`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from performers.convert.calibration import calibrate
from performers.convert.linearize import linearize, load_linearized
from performers.convert.options import FAVOR, FavorOptions
from performers.convert.source import source_config
from performers.data.vocabulary import VOCAB_SIZE
from performers.train.conversion_choices import learns
from performers.train.data import DataConfig
from performers.train.fine_tuning_task import fine_tuning_task

__all__ = [
    "PretrainedConfig",
    "build_pretrained",
    "check_blocks",
    "check_length",
    "checked_start",
    "dropouts",
    "resolved",
    "unloaded",
]

# Calibration reads so many tokens of the training set, as in a conversion, of the longest among
# its first sequences.
CALIBRATION_TOKENS, FIRST = 8192, 1024


@dataclass(frozen=True)
class PretrainedConfig:
    """Which model a run starts from.

    `model`: a model folder of transformers, with a head for the task of the run: an exact one, or
    one that `performers convert` or another run wrote.
    `options`: how an exact one is converted, by the names of `FavorOptions`. `performers convert`
    also measures what is left open there, and recovers by the predictions of the exact model.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def favor(self) -> FavorOptions:
        return FavorOptions.from_dict(self.options)


def checked_start(start: Mapping[str, Any], run: Mapping[str, Any]) -> PretrainedConfig:
    """The section `pretrained`, beside the other keys of the config of a run.

    Raises ValueError for what does not go together.
    """
    if not start.get("model"):
        raise ValueError(
            "pretrained.model must be a model folder of transformers, or one that performers "
            "convert wrote, and is missing."
        )
    if run.get("model"):
        raise ValueError(
            f"a run starts from pretrained.model or makes a model of its own, got the keys "
            f"{', '.join(map(str, run['model']))} of the section model beside it. Leave one of the "
            "two sections out: how attention is estimated is said in pretrained.options."
        )
    if run.get("compare"):
        raise ValueError(
            f"compare is of models that a run makes itself, got {', '.join(run['compare'])} beside "
            "pretrained.model. Give each model a run of its own."
        )
    return PretrainedConfig(**start)


def resolved(config: PretrainedConfig, task: str, seed: int, data: DataConfig) -> PretrainedConfig:
    """The same with all options. Reads the config.json of the folder, and no weights.

    Raises FileNotFoundError for a folder without a model, and ValueError for a model that has not
    the head for the task or does not fit the data, and for options that contradict its own
    conversion.
    """
    model = source_config(config.model)
    able = fine_tuning_task(model).name
    if able != task:
        raise ValueError(
            f"task must be that of the model: {config.model} holds {_architecture(model)}, a model "
            f"for {able}, and the task is {task}. "
            + (
                "Save it with a head for the task, and train it then."
                if able == "encoder"
                else f"Write task: {able}."
            )
        )
    check_length("data.length", data.length, model)
    if data.text is None and model.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"proteins are read with the {VOCAB_SIZE} tokens of performers.data.vocabulary, and "
            f"{config.model} embeds {model.vocab_size}. Give the file as data.text, which the "
            "model's own tokenizer reads, records of FASTA too."
        )
    given = FavorOptions.from_dict(config.options).to_dict()
    own = getattr(model, FAVOR, None)
    if own is None:
        options = {"seed": seed} | config.options
        return dataclasses.replace(config, options=FavorOptions.from_dict(options).to_dict())
    converted = FavorOptions.from_dict(own["options"]).to_dict()
    for name in config.options:
        if given[name] != converted[name]:
            raise ValueError(
                f"{config.model} is converted already, with {name}={converted[name]!r}, and "
                f"pretrained.options.{name} is {given[name]!r}. Leave the options out, or start "
                "from the exact model."
            )
    return dataclasses.replace(config, options=converted)


def check_length(name: str, length: int, model: PreTrainedConfig) -> None:
    """Raise ValueError for sequences that the positions of a model do not reach."""
    longest = getattr(model, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(
            f"{name} must be at most {longest} for this model, its max_position_embeddings, got "
            f"{length}."
        )


def check_blocks(config: PretrainedConfig, longest: int, files: object) -> None:
    """Refuse sequences in which every key is near: nothing would be estimated."""
    window = config.favor.window_size or 0
    if longest <= 2 * window:
        raise ValueError(
            f"a sequence must be longer than two blocks, {2 * window} tokens with "
            f"pretrained.options.window_size={window}, or attention is exact: the longest of "
            f"{files} has {longest}. Give longer ones, with a data.length of {2 * window + 1} or "
            "more, or a smaller window_size."
        )


def dropouts(config: PretrainedConfig) -> dict[str, float]:
    """The options of the folder's own configuration that draw dropout, and are not 0."""
    written = source_config(config.model).to_dict()
    rates = {name: x for name, x in written.items() if "drop" in name and isinstance(x, float)}
    return {f"{name} of {config.model}": rate for name, rate in rates.items() if rate}


def build_pretrained(
    config: PretrainedConfig, examples: Iterable[Mapping[str, Tensor]], device: torch.device
) -> PreTrainedModel:
    """The converted model, in the precision that it is trained in.

    `examples`: of the training set. Features that learn do so from the longest of the first.
    """
    auto_class = fine_tuning_task(source_config(config.model)).auto_class
    if _is_converted(config):
        model = load_linearized(auto_class, config.model, dtype=torch.float32)
        return model.to(device)
    model = auto_class.from_pretrained(config.model, dtype=torch.float32).to(device)
    linearize(model, config.favor)
    if learns(config.favor):
        calibrate(model, _to_calibrate(examples, device))
    return model


def unloaded(config: PretrainedConfig) -> PreTrainedModel:
    """The same model on the meta device: its modules, and the shapes of its weights."""
    model = source_config(config.model)
    with torch.device("meta"):
        built = fine_tuning_task(model).auto_class.from_config(model)
    return linearize(built, config.favor)


def _is_converted(config: PretrainedConfig) -> bool:
    return hasattr(source_config(config.model), FAVOR)


def _architecture(model: PreTrainedConfig) -> str:
    return (model.architectures or ["a model without a name"])[0]


def _to_calibrate(
    examples: Iterable[Mapping[str, Tensor]], device: torch.device
) -> list[dict[str, Tensor]]:
    """A sequence at a time, so that none is padded."""
    rows = [example["input_ids"] for example in islice(examples, FIRST)]
    rows.sort(key=len, reverse=True)
    count, tokens = 0, 0
    while count < len(rows) and (not count or tokens + len(rows[count]) <= CALIBRATION_TOKENS):
        tokens += len(rows[count])
        count += 1
    return [{"input_ids": row[None].to(device)} for row in rows[:count]]
