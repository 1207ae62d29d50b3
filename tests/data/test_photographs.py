"""Photographs and their tiles."""

import pytest
import torch
from PIL import Image

from performers.data.fetch import read_package
from performers.data.photographs import LOMIRI, read_photographs, tiles


def test_tiles_are_disjoint_and_in_reading_order():
    photograph = torch.arange(11 * 7 * 3, dtype=torch.uint8).reshape(11, 7, 3)
    cut = tiles(photograph, 3)
    assert cut.shape == (6, 3, 3, 3)
    assert torch.equal(cut[1], photograph[:3, 3:6])
    assert torch.equal(cut[4], photograph[6:9, :3])


def test_photographs_are_read_in_color_and_at_most_1024_pixels_long(tmp_path):
    folder = tmp_path / "usr/share/backgrounds"
    folder.mkdir(parents=True)
    Image.new("RGB", (2048, 1000), (255, 0, 0)).save(folder / "wide.jpg")
    Image.new("L", (31, 53), 128).save(folder / "gray.jpg")
    found, _ = read_package(LOMIRI, tmp_path)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "wide": (500, 1024, 3),
        "gray": (53, 31, 3),
    }
    assert found["wide"].float().mean((0, 1)).tolist() == pytest.approx([254, 0, 0], abs=2)


def test_a_folder_without_photographs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold photographs, NAME\.jpg"):
        read_photographs(tmp_path)
