"""The Triton kernels in tiles so small that short sequences have several, over memory of NaN."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from performers.backends.triton import config


@pytest.fixture(autouse=True)
def _patched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter patches its language for every function that a kernel calls. For other
    functions of the same module this changes nothing and takes a third of all time: left out."""
    if importlib.util.find_spec("triton"):
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.interpreter import InterpretedFunction as Function

        run, call, patched = GridExecutor.__call__, Function.__call__, set()

        def run_anew(self: GridExecutor, *args: object, **kwargs: object) -> object:
            patched.clear()  # the end of a kernel undoes all
            return run(self, *args, **kwargs)

        def call_patched(self: Function, *args: object, **kwargs: object) -> object:
            module = self.fn.__module__
            if module in patched:
                return self.rewrite()(*args, **kwargs)
            patched.add(module)
            return call(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", run_anew)
        monkeypatch.setattr(Function, "__call__", call_patched)


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
