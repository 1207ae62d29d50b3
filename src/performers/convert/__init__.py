"""Pretrained Transformers: what their attention layers compute with, and FAVOR+ in their place."""

from performers.convert.attention_transfer import (
    averaging_errors,
    exact_copy,
    layer_errors,
    transfer_attention,
)
from performers.convert.cache import FavorCache
from performers.convert.calibration import calibrate
from performers.convert.capture import capture_attention, capture_text, read_captured
from performers.convert.fidelity import Fidelity, measure_fidelity
from performers.convert.interface import register
from performers.convert.linearize import (
    converted_layers,
    linearize,
    load_linearized,
    restore,
)
from performers.convert.mixed import choose_layers, layer_costs
from performers.convert.options import FavorOptions
from performers.convert.saved_states import load_state, save_state
from performers.diagnosis.captured import Captured

__all__ = [
    "Captured",
    "FavorCache",
    "FavorOptions",
    "Fidelity",
    "averaging_errors",
    "calibrate",
    "capture_attention",
    "capture_text",
    "choose_layers",
    "converted_layers",
    "exact_copy",
    "layer_costs",
    "layer_errors",
    "linearize",
    "load_linearized",
    "load_state",
    "measure_fidelity",
    "read_captured",
    "register",
    "restore",
    "save_state",
    "transfer_attention",
]
