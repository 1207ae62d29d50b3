"""Tiles of photographs to train on and to be scored on, and what pixels alone tell of them."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from performers.data.fetch import read_package
from performers.data.photographs import LOMIRI, Photographs, read_photographs, tiles

BYTES = 256


@dataclass(frozen=True)
class Tiles:
    """Tiles of photographs of which none is in both parts, in an order that is drawn by a seed."""

    train: Tensor
    valid: Tensor
    photographs: dict[str, list[str]]
    origin: dict[str, Any]

    @classmethod
    def read(
        cls, source: str, size: int, num_held_out: int, seed: int, report: Callable[[str], None]
    ) -> Tiles:
        """`source`: "lomiri", a Debian package, or "scikit-learn", the two that it ships.
        `num_held_out`: so many photographs are for validation.
        """
        found, origin = _photographs(source, report)
        generator = torch.Generator().manual_seed(seed)
        names = sorted(found)
        order = torch.randperm(len(names), generator=generator).tolist()
        parts = {
            "valid": sorted(names[index] for index in order[:num_held_out]),
            "train": sorted(names[index] for index in order[num_held_out:]),
        }
        cut = {
            part: torch.cat([tiles(found[name], size) for name in chosen])
            for part, chosen in parts.items()
        }
        mixed = {
            part: images[torch.randperm(len(images), generator=generator)]
            for part, images in cut.items()
        }
        return cls(mixed["train"], mixed["valid"], parts, origin)


def marginal_bits(images: Tensor) -> float:
    """The entropy of the bytes of a channel in these images, in bits, as a mean over the channels.

    No model that takes each byte by itself has fewer bits per dimension, even one that has counted
    these images.
    """
    bits = 0.0
    for channel in images.unbind(-1):
        shares = torch.bincount(channel.flatten().long()).double() / channel.numel()
        bits -= float(torch.special.xlogy(shares, shares).sum()) / math.log(2)
    return bits / images.shape[-1]


def frequency_bits(train: Tensor, images: Tensor, is_after: bool) -> float:
    """Bits per dimension of these images if each byte is as likely as in its channel of `train`,
    or, if `is_after`, as after the byte before it there. Counts begin at a tenth.
    """

    def contexts(x: Tensor) -> tuple[Tensor, Tensor]:
        of_images = x.flatten(1).long()
        before = F.pad(of_images[:, :-1], (1, 0)) if is_after else torch.zeros_like(of_images)
        channel = torch.arange(of_images.shape[1]) % x.shape[-1]
        return (channel * BYTES + before).flatten(), of_images.flatten()

    context, byte = contexts(train)
    counts = torch.bincount(context * BYTES + byte, minlength=images.shape[-1] * BYTES**2)
    likely = counts.view(-1, BYTES).double() + 0.1
    likely /= likely.sum(dim=1, keepdim=True)
    return -float(likely[contexts(images)].log2().mean())


def _photographs(source: str, report: Callable[[str], None]) -> tuple[Photographs, dict[str, Any]]:
    if source == "lomiri":
        return read_package(LOMIRI, report=report)
    return read_photographs(Path(sklearn.datasets.__file__).parent / "images"), {}


def packed(images: Tensor) -> str:
    """Bytes as text that JSON can hold."""
    return base64.b64encode(zlib.compress(images.numpy().tobytes(), 9)).decode("ascii")


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes that were `packed`."""
    content = zlib.decompress(base64.b64decode(text))
    return np.frombuffer(content, np.uint8).reshape(shape)
