"""`performers reproduce`: run an experiment of the paper and save its results.

An experiment is a folder experiments/NAME of a checkout with a README.md and an experiment.py,
which holds the four things of `Experiment`. A run writes SCALE.json, and SCALE.png and SCALE.svg
drawn from it alone, and renews the part of the README between the two marks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from performers.checks import check_choice
from performers.data.fetch import read_package
from performers.data.text import AUSTEN
from performers.train.environment import describe_environment
from performers.viz.files import Figure, save_figure

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "SCALES",
    "Experiment",
    "draw",
    "experiment_folder",
    "experiment_names",
    "read_texts",
    "reproduce",
    "resumable_folder",
]

# From the quickest to the paper's own sizes.
SCALES = ("smoke", "reduced", "paper")

BEGIN = "<!-- results: written by `performers reproduce`, from the JSON beside this file -->"
END = "<!-- end of results -->"

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@runtime_checkable
class Experiment(Protocol):
    """What an experiment.py holds."""

    @property
    def CONFIGS(self) -> Mapping[str, DataclassInstance]:  # noqa: N802 (a constant of a module)
        """The sizes of each scale, and a `seed`; scales derive from each other."""

    def run(self, config: Any, report: Callable[[str], None]) -> dict[str, Any]:
        """The numbers, as JSON can hold them. `report` takes lines on how far it is."""

    def figure(self, config: Mapping[str, Any], results: Mapping[str, Any]) -> Figure:
        """The plot, from config and results as they come back out of JSON."""

    def summary(self, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
        """Markdown: the paper's claims beside what was found."""


def experiment_names() -> list[str]:
    """The experiments of this checkout."""
    return sorted(path.parent.name for path in EXPERIMENTS.glob("*/experiment.py"))


def experiment_folder(name: str) -> Path:
    """The folder of an experiment.

    Raises FileNotFoundError where the package was not installed from a checkout, and ValueError
    for unknown names.
    """
    if not EXPERIMENTS.is_dir():
        raise FileNotFoundError(
            f"experiments are part of the repository, not of the package: there is no {EXPERIMENTS}"
            ". Clone the repository and install it with: pip install -e '.[hf,viz]'"
        )
    check_choice("experiment", name, experiment_names())
    return EXPERIMENTS / name


def reproduce(folder: Path, scale: str, report: Callable[[str], None]) -> list[Path]:
    """Run an experiment, save its numbers as SCALE.json in `folder`, draw; return what was written.

    Raises ValueError for an unknown scale, before anything runs.
    """
    experiment = _load(folder)
    check_choice("scale", scale, experiment.CONFIGS)
    config = experiment.CONFIGS[scale]
    began = time.perf_counter()
    results = experiment.run(config, report)
    record = {
        "experiment": folder.name,
        "scale": scale,
        "config": dataclasses.asdict(config),
        "results": results,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": describe_environment(),
    }
    path = folder / f"{scale}.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path, *draw(folder, scale)]


def read_texts(name: str, report: Callable[[str], None]) -> tuple[dict[str, str], dict[str, Any]]:
    """Books by their titles, and where they are from.

    "novels" downloads those of Jane Austen, a Debian package. "excerpts" are in the repository.
    """
    if name == "excerpts":
        files = sorted((EXPERIMENTS / "sharp-minilm").glob("*.txt"))
        return {path.stem: path.read_text(encoding="utf-8") for path in files}, {}
    return read_package(AUSTEN, report=report)


@contextmanager
def resumable_folder(name: str, config: DataclassInstance) -> Iterator[Path]:
    """A folder under runs/ for checkpoints, which the same experiment finds again if interrupted.

    It belongs to this config alone, and is removed when the block ends without an error: a later
    run starts anew.
    """
    digest = sha256(repr(config).encode()).hexdigest()[:8]
    folder = Path("runs", f"{name}-{digest}")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def draw(folder: Path, scale: str) -> list[Path]:
    """Draw an experiment again from its saved numbers, and renew its README.

    The README shows the largest scale of which there are numbers. Returns what was written.
    Raises FileNotFoundError if nothing was saved at this scale.
    """
    experiment = _load(folder)
    record = _read(folder, scale)
    written = save_figure(experiment.figure(record["config"], record["results"]), folder / scale)
    largest = [name for name in SCALES if (folder / f"{name}.json").exists()][-1]
    readme = folder / "README.md"
    readme.write_text(_renewed(readme.read_text(encoding="utf-8"), folder, largest), "utf-8")
    return [*written, readme]


def _renewed(readme: str, folder: Path, scale: str) -> str:
    """The text of a README with its results replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{folder / 'README.md'} must hold the marks {BEGIN!r} and {END!r}.")
    return f"{before}{BEGIN}\n\n{_results_text(folder, scale)}\n\n{END}{after}"


def _results_text(folder: Path, scale: str) -> str:
    experiment, record = _load(folder), _read(folder, scale)
    environment = record["environment"]
    config = ", ".join(
        f"{key} = {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in record["config"].items()
    )
    packages = environment["packages"]
    made_with = (
        f"Made by `performers reproduce {folder.name} --scale {scale}` in "
        f"{record['seconds']:.0f} s on {environment['processor']} "
        f"({environment['threads']} of {environment['cores']} cores), "
        f"performers {packages['performers']}, torch {packages['torch']}, "
        f"Python {environment['python']}. {config}."
    )
    at_scale = "" if scale == "paper" else f"**Not at the paper's scale**, but `{scale}`.\n\n"
    picture = f"![The figure at scale {scale}]({scale}.png)"
    summary = experiment.summary(record["config"], record["results"]).strip()
    return f"{at_scale}{summary}\n\n{picture}\n\n{made_with}"


def _read(folder: Path, scale: str) -> dict[str, Any]:
    check_choice("scale", scale, SCALES)
    path = folder / f"{scale}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"nothing was saved at this scale: there is no {path}. "
            f"Run it with: performers reproduce {folder.name} --scale {scale}"
        )
    return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))


def _load(folder: Path) -> Experiment:
    path = folder / "experiment.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{folder.name}", path)
    assert spec is not None, "a path that ends in .py has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return cast("Experiment", module)
