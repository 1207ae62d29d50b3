"""The mechanisms that the paper compares with, one file each."""

from performers.baselines.identity import Identity

__all__ = ["Identity"]
