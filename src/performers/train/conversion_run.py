"""A conversion: a pretrained model is made to attend by FAVOR+, and trained to recover its quality.

    read text ─► choose a setting, layers, sinks, whether anything is far ─► calibrate
      ─► attention transfer ─► fine-tuning ─► save

What is chosen, and which weights are kept, is decided on text for validation; what is reported is
measured on held-out text. A stage that leaves the model further from the exact one there is undone.

out/
├── model.safetensors, config.json, …   for load_linearized; the exact model for from_pretrained
├── favor.safetensors                   what the feature maps have learned
├── conversion.json                     all numbers of the conversion
└── checkpoints/                        to resume from; removed at the end
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import AutoConfig, PreTrainedModel

from performers.convert.attention_transfer import (
    LayerErrors,
    averaging_errors,
    exact_copy,
    transfer_attention,
)
from performers.convert.calibration import calibrate
from performers.convert.capture import capture_attention
from performers.convert.fidelity import Fidelity, measure_fidelity
from performers.convert.linearize import linearize, load_linearized
from performers.convert.mixed import choose_layers, layer_costs
from performers.convert.options import FavorOptions
from performers.convert.sequences import Sequences
from performers.diagnosis import Frontier
from performers.diagnosis.frontier import NUM_SINKS
from performers.records import TimeLeft, describe_environment
from performers.records.files import read_json
from performers.train.checkpoints import saving, write_atomically
from performers.train.conversion_choices import Chooser, learns
from performers.train.conversion_config import (
    CHECKPOINTS,
    REPORT,
    ConversionConfig,
    check_output,
    num_processes,
)
from performers.train.conversion_data import ConversionData
from performers.train.fine_tuning import fine_tune
from performers.train.folders import claim, release
from performers.train.progress import frontier_with_bar

__all__ = ["Conversion"]

# Settings are measured on this many sequences, after calibration on as many others. More sequences
# would hardly change the numbers.
MEASURED_SEQUENCES = 2

# Calibration reads this much of the text. More would hardly change the statistics.
CALIBRATION_TOKENS = 8192

# Sinks, far fields and the steps of fine-tuning are compared on so many tokens, for validation.
CHOICE_TOKENS = 4096

# A batch of so many tokens is measured at a time.
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Conversion:
    """A conversion that has passed every check and has its data; `run` does the work."""

    config: ConversionConfig
    output: Path
    data: ConversionData

    @classmethod
    def prepare(
        cls, config: ConversionConfig, output: Path, resume: bool = False, force: bool = False
    ) -> Conversion:
        """Read the text, and check what can be checked before the model is touched.

        With `force`, checkpoints in the folder are removed, and other files in it may be
        overwritten.

        Raises ValueError or OSError for a model, text or number that cannot be used, and
        FileExistsError for an output folder that is not empty, unless `resume` or `force` allows
        it.
        """
        check_output(config, output, resume, force)
        data = ConversionData.read(config)
        if force:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return cls(config, output, data)

    def run(self, report: Callable[[str], None]) -> dict[str, Any]:
        """Convert, recover and save; writes and returns what conversion.json holds.

        After an interruption at any moment, a conversion prepared with `resume=True` continues from
        its last checkpoint. Raises FloatingPointError where training diverged, and ValueError where
        no setting is within the wanted error.
        """
        claim(self.output)
        place = self.output / CHECKPOINTS
        place.mkdir(parents=True, exist_ok=True)
        started = self.config.to_dict() | {"processes": num_processes()}
        write_atomically(place / "config.json", _json(started))
        for warning in self.data.warnings:
            report(warning)
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
            before = _weights(model)
            model = fine_tune(
                model,
                teacher,
                self.data.task,
                self.data.train,
                self.data.tokenizer,
                place / "fine-tuning",
                steps=self.config.steps,
                batch_size=self.config.batch_size,
                learning_rate=self.config.learning_rate,
                lora_rank=self.config.lora_rank,
                seed=self.config.seed,
                measure=lambda one: self._fidelity(one, teacher, self._for_choices()).distance,
                measured_sequences=len(self._for_choices()),
            )
            record["seconds"] = round(record["seconds"] + time.perf_counter() - began, 1)
            self._keep_if_closer("after fine-tuning", model, before, teacher, record, report)
        with saving(self.output):
            model.to(_saved_dtype(self.config.model)).save_pretrained(self.output)
            self.data.tokenizer.save_pretrained(self.output)
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
        teacher = exact_copy(linearize(model, options))
        model, options, choices = self._choose(model, teacher, options, report)
        record: dict[str, Any] = {
            "created_with": describe_environment(),
            "config": self.config.to_dict(),
            "options": options.to_dict(),
            "sequences": {
                "train": len(self.data.train),
                "validation": len(self.data.validation),
                "held_out": len(self.data.held_out),
            },
            "frontier": None if frontier is None else dataclasses.asdict(frontier),
            "cost_by_layer": costs,
            **choices,
            "averaging": averaging_errors(model, teacher, self._batches(self.data.held_out)),
            "exact_task_loss": self._task_loss(teacher),
            "stages": {},
        }
        self._measure("calibrated", model, teacher, record, report)
        steps = self.config.transfer_steps
        if steps:
            left = TimeLeft()

            def every_tenth(step: int, loss: float) -> None:
                if step % 10 == 0 or step == steps:
                    progress = f"step {step} of {steps}, {left(step / steps)}"
                    report(f"attention transfer, {progress}: loss {loss:.4f}")

            rate = self.config.transfer_learning_rate
            before = _weights(model)
            transfer_attention(model, teacher, self._transfer_batches(), rate, every_tenth)
            stage = "after attention transfer"
            self._keep_if_closer(stage, model, before, teacher, record, report)
        return model, teacher, record

    def _frontier(self, model: PreTrainedModel) -> Frontier:
        """The settings on text to train on, of which causal layers learn, and for validation."""
        count = min(MEASURED_SEQUENCES, len(self.data.validation), len(self.data.train))
        halves = [self.data.train.longest(count), self.data.validation.longest(count)]
        length = min(rows.shape[1] for rows in halves)
        rows = torch.cat([rows[:, :length] for rows in halves])
        layers = capture_attention(model, input_ids=rows.to(_device()))
        options = self.config.options
        sinks = NUM_SINKS if options.num_sinks is None else options.num_sinks
        return frontier_with_bar(layers, sinks, options.statistics or "calibrated")

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
        costs = layer_costs(model, self._batches(self.data.validation[: self.config.batch_size]))
        layers = choose_layers(costs, self.config.exact_layers)
        for number, cost in costs.items():
            outcome = "converted" if number in layers else "stays exact"
            report(f"layer {number}: by itself an error of {cost:.3f} of the model, {outcome}")
        chosen = dataclasses.replace(options, layers=layers)
        return chosen, {str(number): cost for number, cost in costs.items()}

    def _choose(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        options: FavorOptions,
        report: Callable[[str], None],
    ) -> tuple[PreTrainedModel, FavorOptions, dict[str, Any]]:
        """The converted and calibrated model, with the sinks and the far field that leave it
        closest to the exact one where they were not asked for; and what was measured for that.
        """
        measured: dict[str, Any] = {"num_sinks": None, "far_field": None}
        batches, learn_from = self._batches(self._for_choices()), self._to_calibrate()
        chooser = Chooser(model, teacher, batches, learn_from, self.data.size, report)
        if options.num_sinks is None and options.window_size:
            chosen, counts = chooser.sinks(options)
            options = dataclasses.replace(options, num_sinks=chosen)
            measured["num_sinks"] = {str(n): x.fidelity.distance for n, x in counts.items()}
        if options.far is None and options.far_limit is None and options.window_size:
            name, fields = chooser.far_field(options, self.config.larger_blocks)
            measured["far_field"] = {other: one.to_dict() for other, one in fields.items()}
            return fields[name].model, fields[name].options, measured
        self._linearize(model, options)
        return model, options, measured

    def _linearize(self, model: PreTrainedModel, options: FavorOptions) -> None:
        linearize(model, options)
        if learns(options):
            calibrate(model, self._to_calibrate())

    def _measure(
        self,
        stage: str,
        model: PreTrainedModel,
        teacher: PreTrainedModel,
        record: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Add to the record how far the whole and the layers are from exact, on held-out text."""
        exact = LayerErrors(model, teacher)
        fidelity = measure_fidelity(model, exact, self._batches(self.data.held_out))
        layers = exact.errors()
        loss = self._task_loss(model)
        record["stages"][stage] = {
            "fidelity": dataclasses.asdict(fidelity),
            "task_loss": loss,
            "layers": layers,
            "is_kept": True,
        }
        beside = "" if loss is None else f"loss {loss:.4f}, "
        report(f"{stage}: {fidelity}; {beside}mean error of the layers {_mean(layers):.3f}")

    def _keep_if_closer(
        self,
        stage: str,
        model: PreTrainedModel,
        before: Mapping[str, Tensor],
        teacher: PreTrainedModel,
        record: dict[str, Any],
        report: Callable[[str], None],
    ) -> None:
        """Measure what a stage of recovery gave, and undo it where the model was closer before."""
        kept = [found for found in record["stages"].values() if found["is_kept"]]
        self._measure(stage, model, teacher, record, report)
        found = record["stages"][stage]
        found["is_kept"] = found["fidelity"]["distance"] <= kept[-1]["fidelity"]["distance"]
        if not found["is_kept"]:
            model.load_state_dict(before)
            report(f"{stage} the model is further from the exact one than before: undone")

    def _fidelity(
        self, model: PreTrainedModel, teacher: PreTrainedModel, sequences: Sequences
    ) -> Fidelity:
        return measure_fidelity(model, teacher, self._batches(sequences))

    def _task_loss(self, model: PreTrainedModel) -> float | None:
        data, size = self.data, self.config.batch_size
        examples = data.task.examples(data.held_out, data.tokenizer, self.config.seed)
        batches = [
            default_collate(examples[start : start + size])
            for start in range(0, len(examples), size)
        ]
        return data.task.task_loss(model, batches)

    def _for_choices(self) -> Sequences:
        return self.data.validation[: self._sequences(CHOICE_TOKENS)]

    def _to_calibrate(self) -> list[dict[str, Tensor]]:
        return self._batches(self.data.train[: self._sequences(CALIBRATION_TOKENS)])

    def _sequences(self, tokens: int) -> int:
        """How many sequences have so many tokens, at least one."""
        return max(1, tokens // self.config.length)

    def _batches(self, sequences: Sequences) -> list[dict[str, Tensor]]:
        """Batches to measure on, of no more tokens than the predictions of which fit in memory."""
        size = min(self.config.batch_size, self._sequences(TOKENS_AT_ONCE))
        return sequences.batches(size, _device())

    def _transfer_batches(self) -> list[dict[str, Tensor]]:
        """A batch for each step of attention transfer; sequences repeat if there are too few."""
        count = self.config.transfer_steps * self.config.batch_size
        rows = self.data.train[torch.arange(count) % len(self.data.train)]
        return rows.batches(self.config.batch_size, _device())

    def _load(self) -> PreTrainedModel:
        """The exact model, in the precision that it is trained in."""
        model = self.data.task.auto_class.from_pretrained(self.config.model, dtype=torch.float32)
        return model.to(_device()).eval()


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _saved_dtype(model: str) -> torch.dtype:
    """The precision in which the weights of a model were saved."""
    return getattr(AutoConfig.from_pretrained(model), "dtype", None) or torch.float32


def _mean(errors: Mapping[str, float]) -> float:
    return sum(errors.values()) / len(errors)


def _json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1) + "\n"
