"""What an experiment is: a folder with a module of four parts and a README that shows its numbers.

experiments/NAME/
├── experiment.py    CONFIGS, run, figure and summary, see `Experiment`; it may import what is
│                    beside it: from .other import name
├── README.md        with a block `results:NAME`, which a run renews
├── SCALE.json       config, results and environment of a run
└── SCALE.png, .svg  drawn from the JSON alone
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from performers.checks import check_choice
from performers.records import with_block
from performers.viz.files import Figure

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "EXPERIMENTS",
    "SCALES",
    "Experiment",
    "block_name",
    "experiment_folder",
    "experiment_names",
    "load_experiment",
]

# From the quickest to the paper's own sizes.
SCALES = ("smoke", "reduced", "paper")

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


def block_name(folder: Path) -> str:
    """The name of the block of a README that holds the results."""
    return f"results:{folder.name}"


def load_experiment(folder: Path) -> Experiment:
    """The module of an experiment, after every check that can be made before it runs.

    Raises ValueError for a folder that lacks what an experiment has, and ModuleNotFoundError where
    the experiment needs a package that is not installed.
    """
    for name in ("experiment.py", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(
                f"an experiment must have experiment.py and README.md, {folder} has no {name}."
            )
    readme = folder / "README.md"
    try:
        with_block(readme.read_text(encoding="utf-8"), block_name(folder), "")
    except ValueError as error:
        raise ValueError(f"{readme}: {error}") from None
    path = folder / "experiment.py"
    module = _imported(path)
    for name in ("run", "figure", "summary"):
        _check_function(path, name, getattr(module, name, None))
    _check_configs(path, getattr(module, "CONFIGS", None))
    return cast("Experiment", module)


def _imported(path: Path) -> object:
    # As a package, so that it can import what is beside it: from .other import name.
    spec = importlib.util.spec_from_file_location(
        f"experiment_{path.parent.name}", path, submodule_search_locations=[str(path.parent)]
    )
    assert spec is not None, "a path that ends in .py has a spec"
    assert spec.loader is not None, "and a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _check_function(path: Path, name: str, function: object) -> None:
    arguments = tuple(inspect.signature(getattr(Experiment, name)).parameters)[1:]
    if callable(function):
        try:
            inspect.signature(function).bind(*arguments)
        except TypeError:
            pass
        else:
            return
    found = f"{name}{inspect.signature(function)}" if callable(function) else repr(function)
    raise ValueError(f"{path} must hold a function {name}({', '.join(arguments)}), has {found}.")


def _check_configs(path: Path, configs: object) -> None:
    if not isinstance(configs, Mapping) or tuple(configs) != SCALES:
        found = list(configs) if isinstance(configs, Mapping) else configs
        raise ValueError(
            f"{path} must hold CONFIGS, a config for each of {', '.join(SCALES)}, has {found!r}."
        )
    for scale, config in configs.items():
        if isinstance(config, type) or not dataclasses.is_dataclass(config):
            raise ValueError(
                f"{path} must hold dataclasses in CONFIGS, has {config!r} for {scale}."
            )
        if "seed" not in (field.name for field in dataclasses.fields(config)):
            raise ValueError(f"{path} must give every config a seed, {scale} has none.")
