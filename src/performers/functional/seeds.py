"""One seed from several numbers."""

from __future__ import annotations

__all__ = ["mixed_seed"]


def mixed_seed(seed: int, layer: int, num_redraws: int) -> int:
    """One 63-bit seed from three numbers, by SplitMix64: similar numbers give unrelated seeds."""
    mixed = 0
    for number in (seed, layer, num_redraws):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1
