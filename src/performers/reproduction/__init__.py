"""The experiments of a checkout: what each holds, how one runs, what several need."""

from performers.reproduction.protocol import SCALES, Experiment, experiment_folder, experiment_names
from performers.reproduction.run import Reproduction
from performers.reproduction.shared import kept, read_texts, resumable_folder

__all__ = [
    "SCALES",
    "Experiment",
    "Reproduction",
    "experiment_folder",
    "experiment_names",
    "kept",
    "read_texts",
    "resumable_folder",
]
