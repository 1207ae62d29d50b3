"""What a conversion is asked to do, and whether its folder can take it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from performers.checks import check_count, check_number, check_seed
from performers.convert.options import FavorOptions
from performers.records.files import read_json
from performers.train.folders import check_place, holds_nothing

__all__ = ["CHECKPOINTS", "REPORT", "ConversionConfig", "check_output", "num_processes"]

REPORT = "conversion.json"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class ConversionConfig:
    """What is converted, how, and for how many steps it recovers.

    `options`: how attention is estimated. Sharp features are calibrated, unless `statistics` is
    "call".
    `error`: take the cheapest setting with which the mean error of the heads is at most this
    (`FavorOptions.within`), instead of the features, near field and number of projections among the
    options.
    `larger_blocks`: among what is tried for far keys are larger blocks of near ones than those of
    the options, at no more operations than an estimate of the far keys.
    `exact_layers`: this many layers stay exact, those that cost most (`layer_costs`). The setting
    is chosen first, for all layers, because a better setting costs less than exact attention.
    `transfer_steps`, `steps`: of attention transfer and of fine-tuning; 0 leaves that stage out.
    `lora_rank`: fine-tune matrices of this rank beside the weights instead of the weights; 0
    fine-tunes the weights themselves. Needs the package peft.

    `text`, `text_format`, `columns`: a file, see `performers.data.read_texts`.

    Raises ValueError for numbers that are too small, ModuleNotFoundError without peft.
    """

    model: str
    text: str
    text_format: str | None = None
    columns: tuple[str, ...] = ()
    options: FavorOptions = field(default_factory=FavorOptions)
    error: float | None = None
    larger_blocks: bool = False
    exact_layers: int = 0
    length: int = 512
    batch_size: int = 8
    transfer_steps: int = 60
    transfer_learning_rate: float = 1e-3
    steps: int = 100
    learning_rate: float = 2e-5
    lora_rank: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("length", self.length)
        check_count("batch_size", self.batch_size)
        check_seed(self.seed)
        for name in ("exact_layers", "transfer_steps", "steps", "lora_rank"):
            check_count(name, getattr(self, name), least=0)
        error = () if self.error is None else ("error",)
        for name in ("transfer_learning_rate", "learning_rate", *error):
            check_number(name, getattr(self, name))
        if self.lora_rank and importlib.util.find_spec("peft") is None:
            raise ModuleNotFoundError(
                "lora_rank needs peft, which is not installed. Install it with: pip install "
                "'performers[lora]', or fine-tune all weights."
            )

    def to_dict(self) -> dict[str, Any]:
        """As types that JSON can hold."""
        written = {"options": self.options.to_dict(), "columns": list(self.columns)}
        return {**dataclasses.asdict(self), **written}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> ConversionConfig:
        """From what `to_dict` gave. Choices that are missing there get their defaults."""
        options = FavorOptions.from_dict(written["options"])
        columns = tuple(written.get("columns", ()))
        return cls(**{**written, "options": options, "columns": columns})


def num_processes() -> int:
    """How many processes train together: batches are divided among them, so this is a choice of
    the run like the others.
    """
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_output(config: ConversionConfig, output: Path, resume: bool, force: bool) -> None:
    """Refuse an output folder that this conversion would spoil, or cannot go on with."""
    check_place(output)
    if output.resolve() == Path(config.model).resolve():
        raise FileExistsError(
            f"the output folder {output} is the model itself, whose weights would be lost. Choose "
            "another with --output."
        )
    if resume and force:
        raise ValueError(
            "a conversion is either resumed or started again: give --resume or --force, not both."
        )
    started = output / CHECKPOINTS / "config.json"
    if resume and started.exists():
        remedy = "Start again with --force."
        written = read_json(started, remedy)
        try:
            processes = written.pop("processes", 1)
            before, given = ConversionConfig.from_dict(written).to_dict(), config.to_dict()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{started} describes no conversion: {error}. {remedy}") from error
        before["processes"], given["processes"] = processes, num_processes()
        for name in given:
            if before[name] != given[name]:
                raise ValueError(
                    f"the conversion in {output} was started with {name} = {before[name]!r}, "
                    f"and this is {given[name]!r}. Resume with the same options, or start again "
                    "with --force."
                )
        return
    if resume and (output / REPORT).exists():
        raise FileExistsError(
            f"the conversion in {output} is finished, and there is nothing to go on with. Load it "
            "with performers.load_linearized, or start again with --force."
        )
    if not force and not holds_nothing(output):
        hint = "Add --resume to go on with it, or --force" if started.exists() else "Add --force"
        what = "an unfinished conversion" if started.exists() else "something"
        raise FileExistsError(
            f"the output folder {output} already holds {what}. {hint} to write over it, or choose "
            "another with --output."
        )
