"""Gray images with a label each, read pixel by pixel: photographs of clothing."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from performers.checks import check_count
from performers.data.fetch import DebianPackage
from performers.data.labeled import LabeledSequences

__all__ = ["FASHION_MNIST", "read_idx", "shrink_images"]


def read_idx(images: str | Path, labels: str | Path) -> LabeledSequences:
    """Images and labels as the MNIST family stores them: gzip, a header, a byte per pixel or label.

    Raises ValueError for files that are not of this form.
    """
    pixels, names = (_content(Path(path)) for path in (images, labels))
    return LabeledSequences(
        torch.from_numpy(pixels.reshape(len(pixels), -1)), torch.from_numpy(names).long()
    )


def shrink_images(images: LabeledSequences, side: int) -> LabeledSequences:
    """Square images on side × side pixels, each the mean of a square of them.

    Raises ValueError unless the squares have a whole number of pixels.
    """
    check_count("side", side)
    large = math.isqrt(images.tokens.shape[-1])
    if large % side:
        raise ValueError(
            f"side must divide that of the images, {large}, got {side}. Take one that does."
        )
    pixels = images.tokens.reshape(-1, 1, large, large).float()
    means = F.avg_pool2d(pixels, large // side).round().byte()
    return LabeledSequences(means.flatten(1), images.labels)


def _content(path: Path) -> np.ndarray:
    """The array of a file: 0, 0, 8 for bytes, the number of axes, four bytes for each, content."""
    content = gzip.decompress(path.read_bytes())
    axes = content[3] if content[:3] == bytes([0, 0, 8]) else 0
    start = 4 + 4 * axes
    shape = np.frombuffer(content, ">u4", axes, 4) if len(content) >= start else np.zeros(0)
    if not axes or start + shape.prod(dtype=np.int64) != len(content):
        raise ValueError(f"{path} must be an IDX file of bytes, and is not. Download it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape.astype(int)).copy()


def _read_fashion(folder: Path) -> tuple[LabeledSequences, LabeledSequences]:
    """To train on and to test with."""
    root = folder / "usr/share/datasets/fashion-mnist"
    train, test = (
        read_idx(root / f"{part}-images-idx3-ubyte.gz", root / f"{part}-labels-idx1-ubyte.gz")
        for part in ("train", "t10k")
    )
    return train, test


# 60,000 and 10,000 photographs of clothing in ten classes, 28 × 28 pixels.
FASHION_MNIST = DebianPackage(
    "dataset-fashion-mnist", "MIT (Zalando Research, Fashion-MNIST)", _read_fashion
)
