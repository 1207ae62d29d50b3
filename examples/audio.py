"""A speech encoder that hears more than half a minute: wav2vec2, converted.

wav2vec2 makes 50 frames of each second of sound, all of which attend to each other. `linearize`
replaces this attention in the encoder, and leaves the convolutions before it alone. The same call
serves Whisper, HuBERT and WavLM as far as they attend by transformers' AttentionInterface.

The model is a tiny one with random weights, because nothing can be downloaded here, and the sound
is a chord that fades into noise. The figures are the time for a recording with exact attention and
converted, and how far the frames of the converted model are from those of the exact one. For a
trained model see docs/conversion.md, where Whisper is measured.

Source: Baevski et al. 2020, "wav2vec 2.0"; Choromanski et al. 2021.

Measured in 2 s of CPU time on AMD EPYC, 1 thread(s), torch 2.13.0+cpu:

    a recording: 0.21 s (exact attention 0.29 s)
    relative error of the frames: 0.000
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2Model

from performers import FavorOptions, linearize, restore

RATE = 16_000  # samples of a second


@dataclass(frozen=True)
class Settings:
    width: int = 64
    layers: int = 2
    seconds: int = 60


FULL = Settings()
SMALL = Settings(width=16, layers=1, seconds=6)


def sound(seconds: int) -> Tensor:
    """(1, samples): three tones that give way to noise."""
    clock = torch.arange(seconds * RATE) / RATE
    chord = sum(torch.sin(2 * math.pi * tone * clock) for tone in (220.0, 277.2, 329.6))
    share = clock / seconds
    return ((1 - share) * chord + share * torch.randn(len(clock)))[None]


@torch.inference_mode()
def run(settings: Settings) -> dict[str, str]:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        intermediate_size=2 * settings.width,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    model = Wav2Vec2Model(config).eval()
    samples = sound(settings.seconds)

    def heard() -> tuple[Tensor, float]:
        start = time.process_time()
        return model(samples).last_hidden_state, time.process_time() - start

    exact, exact_seconds = heard()
    linearize(model, FavorOptions(window_size=32))
    converted, seconds = heard()
    restore(model)
    error = (converted - exact).norm() / exact.norm()
    return {
        "a recording": f"{seconds:.2f} s (exact attention {exact_seconds:.2f} s)",
        "relative error of the frames": f"{error:.3f}",
    }


if __name__ == "__main__":
    from measured import command

    command(__file__, run, FULL, SMALL)
