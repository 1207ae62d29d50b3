"""Training with transformers' Trainer: what `performers train` does on proteins, and `performers
convert` with a pretrained model, from Python.
"""

from performers.train.checkpoints import UnsavedError
from performers.train.config import RunConfig, load_config, shipped_configs
from performers.train.conversion_config import ConversionConfig
from performers.train.conversion_run import Conversion
from performers.train.data import DataConfig, StreamConfig
from performers.train.embed import Embedding
from performers.train.evaluate import Evaluation
from performers.train.fill import Filling
from performers.train.generate import Generation
from performers.train.lost import LostProcessError
from performers.train.run import Run, has_finished, holds_run
from performers.train.tables import results_table, scores_table

__all__ = [
    "Conversion",
    "ConversionConfig",
    "DataConfig",
    "Embedding",
    "Evaluation",
    "Filling",
    "Generation",
    "LostProcessError",
    "Run",
    "RunConfig",
    "StreamConfig",
    "UnsavedError",
    "has_finished",
    "holds_run",
    "load_config",
    "results_table",
    "scores_table",
    "shipped_configs",
]
