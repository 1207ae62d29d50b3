"""Pretrained Transformers: what their attention layers compute with, and FAVOR+ in their place."""

from performers.convert.capture import Captured, capture_attention, capture_text, read_captured
from performers.convert.interface import register
from performers.convert.options import FavorOptions

__all__ = [
    "Captured",
    "FavorOptions",
    "capture_attention",
    "capture_text",
    "read_captured",
    "register",
]
