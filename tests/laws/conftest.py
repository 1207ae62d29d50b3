"""The laws hold for every backend, and are put to the test across many small tiles."""

import pytest

from performers.backends import chunked, kernel_chunks, kernel_tiles, scan, tiles
from performers.backends.blocks import sizes


@pytest.fixture(autouse=True)
def small_tiles(without_shape_checks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences cross several tiles, whose sizes are primes that divide nothing here.

    Shapes are checked in tests/contract; here they would take most of the time.
    """
    monkeypatch.setattr(chunked, "KEY_TILE", 11)
    monkeypatch.setattr(chunked, "QUERY_TILE", 5)
    monkeypatch.setattr(chunked, "CAUSAL_CHUNK", 7)
    monkeypatch.setattr(tiles, "PIECE_BYTES", 700)
    monkeypatch.setattr(scan, "CHUNK", 7)
    monkeypatch.setattr(sizes, "HEADS", 5)
    monkeypatch.setattr(sizes, "TILE_BYTES", 1500)
    monkeypatch.setattr(kernel_chunks, "CHUNK", 7)
    monkeypatch.setattr(kernel_chunks, "CHUNKS", 2)
    monkeypatch.setattr(kernel_tiles, "ROWS", 7)
    monkeypatch.setattr(kernel_tiles, "HEADS", 5)
    monkeypatch.setattr(kernel_tiles, "TILE_BYTES", 1)
