"""The Triton kernels in tiles so small that short sequences have several, over memory of NaN."""

from collections.abc import Iterator

import pytest
import torch

from performers.backends.triton import config


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = config.Config.of(rows=16, features=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(config, "CONFIGS", dict.fromkeys(config.CONFIGS, tile))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is full of NaN: what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
