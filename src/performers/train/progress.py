"""Bars for long work that the core does, which knows no bars."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from performers.diagnosis import Frontier
from performers.diagnosis.captured import Captured
from performers.diagnosis.frontier import frontier_steps

__all__ = ["frontier_with_bar"]


def frontier_with_bar(
    layers: Sequence[Captured], num_sinks: int, statistics: str | None = None
) -> Frontier:
    """`performers.diagnosis.measure_frontier`, showing how many settings are measured."""
    steps = frontier_steps(layers, num_sinks, statistics)
    with tqdm(desc="measuring settings", unit="setting") as bar:
        while True:
            try:
                done, bar.total = next(steps)
            except StopIteration as end:
                frontier: Frontier = end.value
                return frontier
            bar.update(done - bar.n)
