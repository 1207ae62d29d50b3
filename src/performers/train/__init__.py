"""Training on proteins with transformers' Trainer: what `performers train` does, from Python."""

from performers.train.config import DataConfig, RunConfig, load_config, shipped_configs
from performers.train.evaluate import Evaluation
from performers.train.generate import Generation
from performers.train.run import Run, has_finished, holds_run
from performers.train.tables import results_table, scores_table

__all__ = [
    "DataConfig",
    "Evaluation",
    "Generation",
    "Run",
    "RunConfig",
    "has_finished",
    "holds_run",
    "load_config",
    "results_table",
    "scores_table",
    "shipped_configs",
]
