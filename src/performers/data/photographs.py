"""Photographs in color, and the square tiles of them that stand for small images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from performers.checks import check_count
from performers.data.fetch import DebianPackage

__all__ = ["LOMIRI", "read_photographs", "tiles"]

LONGEST_SIDE = 1024

Photographs = dict[str, UInt8[Tensor, "height width 3"]]


def tiles(
    photograph: UInt8[Tensor, "height width channels"], size: int
) -> UInt8[Tensor, "tiles size size channels"]:
    """The disjoint tiles of `size` × `size` pixels, row by row; what is left at the right and at
    the bottom belongs to none.
    """
    check_count("size", size)
    cut = photograph.unfold(0, size, size).unfold(1, size, size)
    return cut.permute(0, 1, 3, 4, 2).flatten(0, 1)


def read_photographs(folder: str | Path) -> Photographs:
    """The JPEG files of a folder by their names, none of them longer than 1,024 pixels.

    Raises FileNotFoundError if there is none.
    """
    from PIL import Image

    found = {}
    for path in sorted(Path(folder).glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        found[path.stem] = torch.from_numpy(np.array(image))
    if not found:
        raise FileNotFoundError(f"{folder} must hold photographs, NAME.jpg, and there is none.")
    return found


def _read_lomiri(folder: Path) -> Photographs:
    return read_photographs(folder / "usr/share/backgrounds")


# 15 photographs of landscapes, plants, animals and people.
LOMIRI = DebianPackage(
    "lomiri-wallpapers-16.04",
    "CC BY 4.0, CC BY-SA 4.0, CC BY-SA 3.0 or CC0 1.0: that of each photographer, who is named in "
    "the file's name",
    _read_lomiri,
)
