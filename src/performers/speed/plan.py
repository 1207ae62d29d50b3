"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from performers.speed.settings import SETTINGS, Layer, Setting

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What to measure. Where `memory_lengths`, `contexts` or `model_lengths` are empty, their part
    is left out.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    memory_lengths: tuple[int, ...] = (1024, 4096, 32768)
    contexts: tuple[int, ...] = (1024, 32768, 1048576)
    model_lengths: tuple[int, ...] = (4096,)
    settings: tuple[str, ...] = tuple(SETTINGS)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch: int = 1
    heads: int = 8
    dim: int = 64
    # Projections of the settings that do not fix their number.
    num_projections: int = 256
    repeats: int = 5
    # If a step takes more seconds than this, the mechanism is not tried at greater lengths.
    patience: float = 10.0
    device: str = "cpu"
    seed: int = 0

    def quick(self) -> Plan:
        """A minute or so, to see where this machine stands."""
        return replace(
            self,
            lengths=(256, 1024, 4096),
            memory_lengths=(),
            contexts=(1024, 16384),
            model_lengths=(),
            dtypes=("float32",),
            repeats=2,
            patience=0.5,
        )

    def layer(self, setting: Setting, is_causal: bool) -> Layer:
        count = setting.num_projections or self.num_projections
        return Layer(self.dim, count, self.heads, is_causal, torch.device(self.device))
