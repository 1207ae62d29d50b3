"""A run of an experiment: its numbers, and what is drawn and written from them alone."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.checks import check_choice
from performers.records import describe_environment, read_json, replace_text, write_block
from performers.reproduction.protocol import (
    SCALES,
    Experiment,
    block_name,
    load_experiment,
)
from performers.reproduction.shared import seconds_before
from performers.viz.files import save_figure

__all__ = ["Reproduction"]


@dataclass(frozen=True)
class Reproduction:
    """An experiment at a scale, which has passed every check; `run` does the work."""

    folder: Path
    experiment: Experiment
    scale: str

    @classmethod
    def prepare(cls, folder: Path, scale: str) -> Reproduction:
        """Check all that can be checked before anything runs.

        Raises ValueError for unknown scales and for a folder that lacks what an experiment has,
        ModuleNotFoundError where its module needs a package that is not installed.
        """
        check_choice("scale", scale, SCALES)
        return cls(folder, load_experiment(folder), scale)

    def seconds_of_the_last_run(self) -> float | None:
        """What the last run at this scale took; None if there was none."""
        if not self._numbers(self.scale).is_file():
            return None
        return float(self._read(self.scale)["seconds"])

    def run(self, report: Callable[[str], None]) -> list[Path]:
        """Save the numbers as SCALE.json and draw them; returns the files that were written."""
        config = self.experiment.CONFIGS[self.scale]
        # An interrupted run does not begin anew, and neither does its time.
        began = time.perf_counter() - seconds_before(self.folder.name, config)
        results = self.experiment.run(config, report)
        record = {
            "experiment": self.folder.name,
            "scale": self.scale,
            "config": dataclasses.asdict(config),
            "results": results,
            "seconds": round(time.perf_counter() - began, 1),
            "environment": describe_environment(),
        }
        path = self._numbers(self.scale)
        replace_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return [path, *self.draw()]

    def draw(self) -> list[Path]:
        """Draw the saved numbers again, and renew the README; returns the files that were written.

        The README shows the largest scale of which there are numbers. Raises FileNotFoundError if
        nothing was saved at this scale.
        """
        record = self._read(self.scale)
        figure = self.experiment.figure(record["config"], record["results"])
        written = save_figure(figure, self.folder / self.scale)
        largest = [scale for scale in SCALES if self._numbers(scale).exists()][-1]
        readme = self.folder / "README.md"
        write_block(readme, block_name(self.folder), self._results_text(self._read(largest)))
        return [*written, readme]

    def _numbers(self, scale: str) -> Path:
        return self.folder / f"{scale}.json"

    def _read(self, scale: str) -> dict[str, Any]:
        path = self._numbers(scale)
        if not path.is_file():
            raise FileNotFoundError(
                f"nothing was saved at this scale: there is no {path}. "
                f"Run it with: performers reproduce {self.folder.name} --scale {scale}"
            )
        return read_json(path, f"Measure again: performers reproduce {self.folder.name}.")

    def _results_text(self, record: dict[str, Any]) -> str:
        scale, environment = record["scale"], record["environment"]
        tables = [key for key, value in record["config"].items() if isinstance(value, dict)]
        config = ", ".join(
            f"{key} = {', '.join(map(str, value)) if isinstance(value, list) else value}"
            for key, value in record["config"].items()
            if key not in tables
        )
        if tables:
            config += f"; {', '.join(tables)} are in [{scale}.json]({scale}.json)"
        packages = environment["packages"]
        made_with = (
            f"Made by `performers reproduce {self.folder.name} --scale {scale}` in "
            f"{record['seconds']:.0f} s on {environment['processor']} "
            f"({environment['threads']} of {environment['cores']} cores), "
            f"performers {packages['performers']}, torch {packages['torch']}, "
            f"Python {environment['python']}. {config}."
        )
        at_scale = "" if scale == "paper" else f"**Not at the paper's scale**, but `{scale}`.\n\n"
        picture = f"![The figure at scale {scale}]({scale}.png)"
        summary = self.experiment.summary(record["config"], record["results"]).strip()
        return f"{at_scale}{summary}\n\n{picture}\n\n{made_with}"
