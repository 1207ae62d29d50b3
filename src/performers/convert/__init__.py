"""Pretrained Transformers: what their attention layers compute with."""

from performers.convert.capture import Captured, capture_attention, capture_text, read_captured

__all__ = ["Captured", "capture_attention", "capture_text", "read_captured"]
