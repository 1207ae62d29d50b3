"""Pretrained Transformers: what their attention layers compute with, and FAVOR+ in their place."""

from performers.convert.cache import FavorCache
from performers.convert.calibration import calibrate
from performers.convert.capture import capture_attention, capture_text, read_captured
from performers.convert.interface import register
from performers.convert.linearize import linearize, load_linearized, restore
from performers.convert.options import FavorOptions
from performers.typing import Captured

__all__ = [
    "Captured",
    "FavorCache",
    "FavorOptions",
    "calibrate",
    "capture_attention",
    "capture_text",
    "linearize",
    "load_linearized",
    "read_captured",
    "register",
    "restore",
]
