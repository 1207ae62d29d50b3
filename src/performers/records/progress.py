"""How long work will take on, judged by the part of it that is done."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["TimeLeft", "duration"]


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(7.2), duration(95.0), duration(3.7 * 3600)
    ('7 s', '2 min', '3.7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class TimeLeft:
    """The time that work still needs, in words for a line of progress.

    `expected`: the seconds that all of it took before, if that is known. Else what is left is
    judged by the share that is done, as if the rest went as fast.

    >>> ticks = iter([0.0, 30.0, 100.0])
    >>> left = TimeLeft(clock=lambda: next(ticks))
    >>> left(1 / 3), left(1.0)
    ('about 60 s left', 'about 0 s left')
    """

    def __init__(
        self, expected: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.expected = expected
        self.clock = clock
        self.began = clock()

    def __call__(self, share: float | None = None) -> str:
        passed = self.clock() - self.began
        if share:
            return f"about {duration(passed * (1 - share) / share)} left"
        if self.expected is not None:
            return f"about {duration(max(self.expected - passed, 0.0))} left"
        return f"{duration(passed)} so far"
