"""A conversion: a pretrained model is made to attend by FAVOR+, and trained to recover its quality.

    read text ─► choose a setting, then layers, then whether anything is far ─► calibrate
      ─► attention transfer ─► fine-tuning ─► save

out/
├── model.safetensors, config.json, …   for load_linearized; the exact model for from_pretrained
├── favor.safetensors                   what the feature maps have learned
├── conversion.json                     all numbers of the conversion
└── checkpoints/                        to resume from; removed at the end
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import default_collate
from transformers import AutoConfig, PreTrainedModel

from performers.checks import check_count, check_number, check_seed
from performers.convert.attention_transfer import (
    averaging_errors,
    exact_copy,
    layer_errors,
    transfer_attention,
)
from performers.convert.calibration import calibrate
from performers.convert.capture import capture_attention, text_windows
from performers.convert.fidelity import measure_fidelity
from performers.convert.linearize import linearize, load_linearized
from performers.convert.mixed import choose_layers, layer_costs
from performers.convert.options import FavorOptions
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.diagnosis import Frontier, measure_frontier
from performers.nn.words import SHARP
from performers.records.environment import describe_environment
from performers.records.files import read_json, read_text
from performers.train.checkpoints import saving, write_atomically
from performers.train.fine_tuning import FineTuningTask, fine_tune, fine_tuning_task
from performers.train.folders import check_place, claim, holds_nothing, release

__all__ = ["REPORT", "Conversion", "ConversionConfig"]

REPORT = "conversion.json"
CHECKPOINTS = "checkpoints"

# Settings are measured on this many sequences, after calibration on as many others. More sequences
# would hardly change the numbers.
MEASURED_SEQUENCES = 2

# Calibration reads this much of the text. More would hardly change the statistics.
CALIBRATION_TOKENS = 8192

# Whether a far field is worth its place is measured on so many, from the end of what is trained on,
# where calibration does not reach in a long text.
FAR_TOKENS = 4096

# Measuring these costs about as much as two steps of training at the default batch size.
MOST_HELD_OUT = 16

# The fewest sequences with which there is something to calibrate on, to train on and to hold out.
FEWEST_SEQUENCES = 4


@dataclass(frozen=True)
class ConversionConfig:
    """What is converted, how, and for how many steps it recovers.

    `options`: how attention is estimated. Sharp features are calibrated, unless `statistics` is
    "call".
    `error`: take the cheapest setting with which the mean error of the heads is at most this
    (`FavorOptions.within`), instead of the features, near field and number of projections among the
    options.
    `exact_layers`: this many layers stay exact, those that cost most (`layer_costs`). The setting
    is chosen first, for all layers, because a better setting costs less than exact attention.
    `transfer_steps`, `steps`: of attention transfer and of fine-tuning; 0 leaves that stage out.
    `lora_rank`: fine-tune matrices of this rank beside the weights instead of the weights; 0
    fine-tunes the weights themselves. Needs the package peft.

    Raises ValueError for numbers that are too small, ModuleNotFoundError without peft.
    """

    model: str
    text: str
    options: FavorOptions = field(default_factory=FavorOptions)
    error: float | None = None
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
        return {**dataclasses.asdict(self), "options": self.options.to_dict()}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> ConversionConfig:
        """From what `to_dict` gave. Choices that are missing there get their defaults."""
        return cls(**{**written, "options": FavorOptions.from_dict(written["options"])})


@dataclass(frozen=True)
class Conversion:
    """A conversion that has passed every check and has its data; `run` does the work."""

    config: ConversionConfig
    output: Path
    task: FineTuningTask
    tokenizer: Any
    train: Int[Tensor, "sequences length"]
    held_out: Int[Tensor, "held_out length"]

    @classmethod
    def prepare(
        cls, config: ConversionConfig, output: Path, resume: bool = False, force: bool = False
    ) -> Conversion:
        """Read the text, and check what can be checked before the model is touched.

        The last tenth of the text is held out, at most 16 sequences. With `force`, checkpoints in
        the folder are removed, and other files in it may be overwritten.

        Raises ValueError or OSError for a model, text or number that cannot be used, and
        FileExistsError for an output folder that is not empty, unless `resume` or `force` allows
        it.
        """
        _check_output(config, output, resume, force)
        model = source_config(config.model)
        task = fine_tuning_task(model)
        tokenizer = source_tokenizer(config.model)
        longest = getattr(model, "max_position_embeddings", None) or tokenizer.model_max_length
        if config.length > min(longest, tokenizer.model_max_length):
            raise ValueError(
                f"length must be at most {min(longest, tokenizer.model_max_length)} for this "
                f"model, got {config.length}."
            )
        layers = getattr(model, "num_hidden_layers", None)
        if layers is not None and config.exact_layers >= layers:
            raise ValueError(
                f"exact_layers must leave a layer to convert: this model has {layers}, and "
                f"{config.exact_layers} would stay exact."
            )
        rows = text_windows(tokenizer, read_text(Path(config.text)), config.length)
        if len(rows) < FEWEST_SEQUENCES:
            raise ValueError(
                f"the text must have at least {FEWEST_SEQUENCES} sequences of {config.length} "
                f"tokens, and better hundreds: {config.text} has {len(rows)}. Give a longer text "
                "or a smaller length."
            )
        check_source_weights(config.model)
        if force:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        count = min(max(1, len(rows) // 10), MOST_HELD_OUT)
        train, held_out = rows[:-count], rows[-count:]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
        return cls(config, output, task, tokenizer, train[order], held_out)

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Convert, recover and save; writes and returns what conversion.json holds.

        After an interruption at any moment, a conversion prepared with `resume=True` continues from
        its last checkpoint. Raises FloatingPointError where training diverged, and ValueError where
        no setting is within the wanted error.
        """
        claim(self.output)
        place = self.output / CHECKPOINTS
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / "config.json", _json(self.config.to_dict()))
        began = time.perf_counter()
        found = place / "transferred.json"  # written after the model, so the model is complete
        exact = self._load()
        if found.exists():
            record = read_json(found, remedy="Delete it, and --resume converts the model again.")
            teacher = exact_copy(linearize(exact, FavorOptions.from_dict(record["options"])))
            model = load_linearized(type(exact), place / "transferred", dtype=torch.float32)
            model = model.to(exact.device)
        else:
            model, teacher, record = self._convert(exact, report)
            with saving(place / "transferred"):
                model.save_pretrained(place / "transferred")
            record["seconds"] = round(time.perf_counter() - began, 1)
            write_atomically(found, _json(record))
        if self.config.steps:
            began = time.perf_counter()
            model = fine_tune(
                model,
                teacher,
                self.task,
                self.train,
                self.tokenizer,
                place / "fine-tuning",
                steps=self.config.steps,
                batch_size=self.config.batch_size,
                learning_rate=self.config.learning_rate,
                lora_rank=self.config.lora_rank,
                seed=self.config.seed,
            )
            record["seconds"] = round(record["seconds"] + time.perf_counter() - began, 1)
            self._measure("after fine-tuning", model, teacher, record, report)
        with saving(self.output):
            model.to(_saved_dtype(self.config.model)).save_pretrained(self.output)
            self.tokenizer.save_pretrained(self.output)
        write_atomically(self.output / REPORT, _json(record))
        shutil.rmtree(place)
        release(self.output)
        return record

    def _convert(
        self, model: PreTrainedModel, report: Callable[[str], None]
    ) -> tuple[PreTrainedModel, PreTrainedModel, dict[str, Any]]:
        """The model with its setting and layers chosen, calibrated, and with its attention
        transferred; the teacher; and the measurements.
        """
        options = self.config.options
        frontier = None
        if self.config.error is not None:
            frontier = self._frontier(model)
            options = self._within(frontier, self.config.error, report)
        costs: dict[str, float] = {}
        if self.config.exact_layers:
            options, costs = self._choose_layers(model, options, report)
        self._linearize(model, options)
        teacher = exact_copy(model)
        options, far_field = self._choose_far(model, teacher, options, report)
        record: dict[str, Any] = {
            "created_with": describe_environment(),
            "config": self.config.to_dict(),
            "options": options.to_dict(),
            "sequences": {"train": len(self.train), "held_out": len(self.held_out)},
            "frontier": None if frontier is None else dataclasses.asdict(frontier),
            "cost_by_layer": costs,
            "far_field": far_field,
            "averaging": averaging_errors(model, teacher, self._batches(self.held_out)),
            "measure": self.task.measure,
            "exact": self._quality(teacher, teacher),
            "stages": {},
        }
        self._measure("calibrated", model, teacher, record, report)
        steps = self.config.transfer_steps
        if steps:

            def every_tenth(step: int, loss: float) -> None:
                if step % 10 == 0 or step == steps:
                    report(f"attention transfer, step {step} of {steps}: loss {loss:.4f}")

            rate = self.config.transfer_learning_rate
            transfer_attention(model, teacher, self._transfer_batches(), rate, every_tenth)
            self._measure("after attention transfer", model, teacher, record, report)
        return model, teacher, record

    def _frontier(self, model: PreTrainedModel) -> Frontier:
        """The settings on text to train on, of which causal layers learn, and on held-out text."""
        count = min(MEASURED_SEQUENCES, len(self.held_out), len(self.train))
        rows = torch.cat([self.train[:count], self.held_out[:count]])
        layers = capture_attention(model, input_ids=rows.to(_device()))
        options = self.config.options
        assert options.num_sinks is not None, "FavorOptions has chosen a number"
        return measure_frontier(layers, options.num_sinks, options.statistics or "calibrated")

    def _within(
        self, frontier: Frontier, error: float, report: Callable[[str], None]
    ) -> FavorOptions:
        """The options with the cheapest setting of at most this error."""
        setting = frontier.within(error)
        report(f"{setting}: an error of {setting.error:.3f} for {frontier.cost(setting)}")
        kept = ("projection", "layers", "exact_heads", "seed")
        others = {name: getattr(self.config.options, name) for name in kept}
        return FavorOptions.within(frontier, error, **others)

    def _choose_layers(
        self, model: PreTrainedModel, options: FavorOptions, report: Callable[[str], None]
    ) -> tuple[FavorOptions, dict[str, float]]:
        """The options with the layers that are converted, and what each layer costs the model."""
        self._linearize(model, options)
        costs = layer_costs(model, self._batches(self.held_out[: self.config.batch_size]))
        layers = choose_layers(costs, self.config.exact_layers)
        for number, cost in costs.items():
            outcome = "converted" if number in layers else "stays exact"
            report(f"layer {number}: by itself an error of {cost:.3f} of the model, {outcome}")
        chosen = dataclasses.replace(options, layers=layers)
        return chosen, {str(number): cost for number, cost in costs.items()}

    def _choose_far(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        options: FavorOptions,
        report: Callable[[str], None],
    ) -> tuple[FavorOptions, dict[str, Any] | None]:
        """The options with a far field or without, whichever leaves the converted model closer to
        the exact one, and the fidelity of both; as they are where that was asked for.

        A model bears what is missing better than an estimate with a heavy tail, and no error of a
        single layer shows it.
        """
        if options.far is not None or not options.window_size:
            return options, None
        batches = self._batches(self.train[-max(1, FAR_TOKENS // self.config.length) :])
        estimated = measure_fidelity(model, teacher, batches)
        chosen = dataclasses.replace(options, far=False)
        self._linearize(model, chosen)
        alone = measure_fidelity(model, teacher, batches)
        if estimated.distance < alone.distance:
            chosen = dataclasses.replace(options, far=True)
            self._linearize(model, chosen)
        report(f"with an estimated far field: {estimated}")
        report(f"with the near field alone: {alone}")
        report("chosen: " + ("the estimate" if chosen.far else "nothing far, which costs less"))
        found = {"estimated": estimated, "left out": alone}
        return chosen, {name: dataclasses.asdict(fidelity) for name, fidelity in found.items()}

    def _linearize(self, model: PreTrainedModel, options: FavorOptions) -> None:
        linearize(model, options)
        learns = options.features == SHARP and options.statistics != "call"
        if learns and options.far is not False:
            sequences = self.train[: max(1, CALIBRATION_TOKENS // self.config.length)]
            calibrate(model, self._batches(sequences))

    def _measure(
        self,
        stage: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        record: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Add to the record how far the layers and the whole are from exact, on held-out text."""
        layers = layer_errors(model, teacher, self._batches(self.held_out))
        quality = self._quality(model, teacher)
        fidelity = measure_fidelity(model, teacher, self._batches(self.held_out))
        record["stages"][stage] = {
            "layers": layers,
            "quality": quality,
            "fidelity": dataclasses.asdict(fidelity),
        }
        report(
            f"{stage}: {fidelity}; {self.task.measure} {quality:.4f}, mean error of the layers "
            f"{_mean(layers):.3f}"
        )

    def _quality(self, model: PreTrainedModel, teacher: PreTrainedModel) -> float:
        examples = self.task.examples(self.held_out, self.tokenizer, self.config.seed)
        size = self.config.batch_size
        batches = [
            default_collate(examples[start : start + size])
            for start in range(0, len(examples), size)
        ]
        return self.task.quality(model, teacher, batches)

    def _batches(self, rows: Int[Tensor, "sequences length"]) -> list[dict[str, Tensor]]:
        device = _device()
        return [{"input_ids": batch.to(device)} for batch in rows.split(self.config.batch_size)]

    def _transfer_batches(self) -> list[dict[str, Tensor]]:
        """A batch for each step of attention transfer; sequences repeat if there are too few."""
        count = self.config.transfer_steps * self.config.batch_size
        return self._batches(self.train[torch.arange(count) % len(self.train)])

    def _load(self) -> PreTrainedModel:
        """The exact model, in the precision that it is trained in."""
        model = self.task.auto_class.from_pretrained(self.config.model, dtype=torch.float32)
        return model.to(_device()).eval()


def _check_output(config: ConversionConfig, output: Path, resume: bool, force: bool) -> None:
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
            before, given = ConversionConfig.from_dict(written).to_dict(), config.to_dict()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{started} describes no conversion: {error}. {remedy}") from error
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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _saved_dtype(model: str) -> torch.dtype:
    """The precision in which the weights of a model were saved."""
    return getattr(AutoConfig.from_pretrained(model), "dtype", None) or torch.float32


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1) + "\n"
