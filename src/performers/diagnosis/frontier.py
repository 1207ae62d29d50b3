"""What an error costs: a grid of near fields and projections, tried on given queries and keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from jaxtyping import Float
from torch import Tensor

from performers.checks import check_choice, check_count, check_number
from performers.diagnosis.captured import Captured, relative_errors
from performers.functional.favor import favor_attention, without_sinks
from performers.functional.sharp import QUERY_RATIO
from performers.functional.softmax import softmax_attention
from performers.nn.feature_maps import SoftmaxFeatures
from performers.nn.sharp import STATISTICS, SharpFeatures
from performers.records import aligned
from performers.theory.cost import exact_operations, favor_operations

__all__ = [
    "NUM_SINKS",
    "PROJECTIONS",
    "WINDOWS",
    "Frontier",
    "Setting",
    "frontier_steps",
    "measure_frontier",
]

# The grid, each step twice the cost of the one before. None is no near field. Blocks half as large
# again, with nothing far, cost about what features beside the smaller ones do.
WINDOWS = (None, 16, 32, 64, 128, 256)
PROJECTIONS = (16, 32, 64, 128, 256)

# Exact keys beside every near field. There are few, because every query scores them.
NUM_SINKS = 4

# The time of a setting is the median over this many rounds.
ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """One way to attend, with its error and its cost, averaged over layers.

    `features`: "sharp" or "positive", as in `FavorOptions`.
    `window_size`: None for no near field. `num_projections`: 0 for the near field alone.
    `num_sinks`: exact keys for every query; none without a near field.
    `error`: ‖out − exact‖ / ‖exact‖, the mean over sequences and heads too.
    `operations`: of one head, counted by `theory.favor_operations`.
    `is_on_frontier`: True if no setting of at most the same cost has a smaller error; averaging and
    exact attention count as settings.
    `seconds`: of one sequence in the first layer, on this machine; on the frontier only.
    """

    features: str
    window_size: int | None
    num_projections: int
    num_sinks: int
    error: float
    operations: float
    is_on_frontier: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        near = "" if self.window_size is None else f"blocks of {self.window_size}"
        if not self.num_projections:
            return f"{near} alone"
        return ", ".join(filter(None, [near, f"{self.features}, m = {self.num_projections}"]))


@dataclass(frozen=True)
class Frontier:
    """What `measure_frontier` found; `str` makes tables of it, `dataclasses.asdict` JSON.

    `settings`: the cheapest first. `length`: the keys of a sequence, of the longest layer.
    `statistics`: as they were given.
    `averaging_error`: the error of uniform attention. A useful setting has a smaller one.
    `exact_operations`, `exact_seconds`: of exact attention, counted and timed alike.
    """

    settings: tuple[Setting, ...]
    length: int
    statistics: str | None
    averaging_error: float
    exact_operations: float
    exact_seconds: float

    def within(self, error: float) -> Setting:
        """The cheapest setting with at most this error, whether or not it is cheaper than exact.

        Raises ValueError where there is none.
        """
        check_number("error", error)
        for setting in self.settings:
            if setting.error <= error:
                return setting
        best = min(self.settings, key=lambda setting: setting.error)
        raise ValueError(
            f"error must be one that a setting meets at length {self.length}: the lowest is "
            f"{best.error:.3f} ({best}), got {error:g}. Allow that much, or keep exact attention."
        )

    def cost(self, setting: Setting) -> str:
        """The cost of a setting in a sentence, beside that of exact attention."""
        ratio = setting.operations / self.exact_operations
        if ratio < 1:
            return f"{ratio:.2f} of the operations of exact attention at length {self.length}"
        return (
            f"{ratio:.2f} times the operations of exact attention: no setting with this error is "
            f"cheaper than exact attention at length {self.length}"
        )

    def __str__(self) -> str:
        return "\n\n".join([self._grid(), self._frontier()])

    def _grid(self) -> str:
        """Errors: a row for each near field, a column for each m."""
        columns = sorted({setting.num_projections for setting in self.settings})
        rows: dict[str, dict[int, str]] = {}
        by_window = sorted(
            self.settings,
            key=lambda setting: (setting.features == "sharp", setting.window_size or 0),
        )
        for setting in by_window:
            near = "" if setting.window_size is None else f", blocks of {setting.window_size}"
            cells = rows.setdefault(f"{setting.features}{near}", {})
            cells[setting.num_projections] = f"{setting.error:.3f}"
        header = ["error", *(f"m = {m}" if m else "near alone" for m in columns)]
        body = [[name, *(cells.get(m, "–") for m in columns)] for name, cells in rows.items()]
        return "\n".join([*aligned([header, *body]), f"averaging: {self.averaging_error:.3f}"])

    def _frontier(self) -> str:
        """The settings worth having, beside exact attention."""
        chosen = [setting for setting in self.settings if setting.is_on_frontier]
        if not chosen:
            return f"No setting is cheaper than exact attention at length {self.length}."
        rows = [["cheapest for its error", "error", "operations ÷ exact", "time ÷ exact"]]
        for setting in chosen:
            assert setting.seconds is not None, "all on the frontier are timed"
            costs = (
                setting.operations / self.exact_operations,
                setting.seconds / self.exact_seconds,
            )
            rows.append([str(setting), f"{setting.error:.3f}", *(f"{x:.2f}" for x in costs)])
        last = (
            f"Below an error of {chosen[-1].error:.3f} no setting is cheaper than exact attention "
            f"at length {self.length}."
        )
        return "\n".join([*aligned(rows), last])


def measure_frontier(
    layers: Sequence[Captured],
    num_sinks: int = NUM_SINKS,
    statistics: str | None = None,
    windows: Sequence[int | None] = WINDOWS,
    num_projections: Sequence[int] = PROJECTIONS,
) -> Frontier:
    """The errors and costs of a grid of settings on the self-attention of a model's layers.

    `layers`: what `performers.convert.capture_attention` returns, or others of that type. Layers
    whose queries and keys differ in number are left out.
    `num_sinks`: exact keys for all beside a near field, see `favor_attention`.
    `statistics`: of sharp features. None: those of each sequence, and "calibrated" where attention
    is causal. Calibrated features learn on the first half of the batch and are measured on the
    other half; a batch of one serves for both.
    `windows`: those that leave more than two blocks; with two or one attention is exact. With
    nothing far, blocks half as large again are tried too.

    Raises ValueError where there is no self-attention, nothing to try, or too little to learn from.
    Cost: the grid's, and that of exact attention, once for every layer.

    >>> query, key, value = torch.randn(3, 1, 2, 128, 16).unbind()
    >>> layer = Captured("layer", query, key, value, scale=None, is_causal=False)
    >>> frontier = measure_frontier([layer], windows=[None, 16], num_projections=[32])
    >>> [str(setting) for setting in frontier.settings]
    ['blocks of 16 alone', 'positive, m = 32', 'blocks of 24 alone', 'sharp, m = 32', \
'blocks of 16, sharp, m = 32']
    """
    steps = frontier_steps(layers, num_sinks, statistics, windows, num_projections)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            frontier: Frontier = end.value
            return frontier


@torch.no_grad()
def frontier_steps(
    layers: Sequence[Captured],
    num_sinks: int = NUM_SINKS,
    statistics: str | None = None,
    windows: Sequence[int | None] = WINDOWS,
    num_projections: Sequence[int] = PROJECTIONS,
) -> Generator[tuple[int, int], None, Frontier]:
    """`measure_frontier` for whoever shows how far it is, or ends it early: yields the settings
    that were measured and the settings in all, and returns the frontier.
    """
    layers = [layer for layer in layers if layer.query.shape[2] == layer.key.shape[2]]
    if not layers:
        raise ValueError(
            "there must be self-attention, as many queries as keys, to measure settings on: got "
            "none. Capture a model with performers.convert.capture_attention."
        )
    if statistics is not None:
        check_choice("statistics", statistics, STATISTICS)
    for count in (*filter(None, windows), *num_projections):
        check_count("windows and num_projections", count)
    length = max(layer.key.shape[2] for layer in layers)
    grid = list(_grid(length, num_sinks, windows, num_projections))
    if not grid:
        raise ValueError(
            f"there must be a setting to measure: of windows {list(windows)} none leaves three "
            f"blocks of {length} positions. Add None, for no near field, or smaller ones."
        )
    cases = [_Layer(layer, statistics) for layer in layers]
    found: list[Setting] = []
    for setting in grid:
        yield len(found), len(grid)
        error = fmean(case.error(case.call(*setting)()) for case in cases)
        operations = fmean(case.operations(*setting) for case in cases)
        found.append(Setting(*setting, error=error, operations=operations))
    yield len(found), len(grid)
    exact = fmean(exact_operations(case.length, case.dim, case.is_causal) for case in cases)
    averaging_error = fmean(case.error(case.averaged()) for case in cases)
    settings = _marked(found, averaging_error, exact)
    chosen = [setting for setting in settings if setting.is_on_frontier]
    exact_seconds, *seconds = _seconds(
        [
            cases[0].exact_call(),
            *(
                cases[0].call(x.features, x.window_size, x.num_projections, x.num_sinks, count=1)
                for x in chosen
            ),
        ]
    )
    timed = dict(zip(chosen, seconds, strict=True))
    return Frontier(
        tuple(replace(setting, seconds=timed.get(setting)) for setting in settings),
        length,
        statistics,
        averaging_error,
        exact,
        exact_seconds,
    )


def _grid(
    length: int, num_sinks: int, windows: Iterable[int | None], num_projections: Sequence[int]
) -> Iterator[tuple[str, int | None, int, int]]:
    """(features, window_size, num_projections, num_sinks) of each setting."""
    for window in windows:
        if window is None:
            for m in num_projections:
                yield from (("positive", None, m, 0), ("sharp", None, m, 0))
            continue
        if 2 * window < length:
            yield from (("sharp", window, m, num_sinks) for m in (0, *num_projections))
        larger = window * 3 // 2
        if window < larger and 2 * larger < length:
            yield ("sharp", larger, 0, num_sinks)


def _marked(
    settings: Iterable[Setting], averaging_error: float, exact_operations: float
) -> list[Setting]:
    """The settings from the cheapest on, those on the frontier marked."""
    marked, lowest = [], averaging_error
    for setting in sorted(settings, key=lambda x: (x.operations, x.error)):
        is_best = setting.error < lowest and setting.operations < exact_operations
        lowest = min(lowest, setting.error)
        marked.append(replace(setting, is_on_frontier=is_best))
    return marked


class _Layer:
    """One layer: the sequences to measure, their exact outputs, and φ for every setting."""

    def __init__(self, layer: Captured, statistics: str | None) -> None:
        self.is_causal = layer.is_causal
        self.statistics = statistics or ("calibrated" if layer.is_causal else "call")
        self.scale = layer.key.shape[-1] ** -0.5 if layer.scale is None else layer.scale
        self.seen = self.measured = (layer.query, layer.key, layer.value)
        half = len(layer.query) // 2
        if half and self.statistics == "calibrated":
            self.seen, self.measured = (
                (layer.query[part], layer.key[part], layer.value[part])
                for part in (slice(half), slice(half, None))
            )
        self.key_heads, self.length, self.dim = layer.key.shape[1:]
        self.maps: dict[tuple[str, int, float, int], SoftmaxFeatures | SharpFeatures] = {}
        self.exact = self.exact_call(None)()

    def call(
        self,
        features: str,
        window_size: int | None,
        num_projections: int,
        num_sinks: int,
        count: int | None = None,
    ) -> Callable[[], Tensor]:
        """`favor_attention` of the first `count` sequences."""
        query_ratio = QUERY_RATIO if window_size is None else 1.0
        phi = self._feature_map(features, max(num_projections, 1), query_ratio, num_sinks)
        query, key, value = (x[:count] for x in self.measured)
        return lambda: favor_attention(
            query,
            key,
            value,
            phi,
            is_causal=self.is_causal,
            scale=self.scale,
            enable_gqa=True,
            window_size=window_size,
            num_sinks=num_sinks,
            far=num_projections > 0,
        )

    def exact_call(self, count: int | None = 1) -> Callable[[], Tensor]:
        query, key, value = (x[:count] for x in self.measured)
        return lambda: softmax_attention(
            query, key, value, self.is_causal, scale=self.scale, enable_gqa=True
        )

    def averaged(self) -> Tensor:
        query, key, value = self.measured
        return softmax_attention(
            torch.zeros_like(query), key, value, self.is_causal, enable_gqa=True
        )

    def error(self, out: Float[Tensor, "batch heads length value_dim"]) -> float:
        return float(relative_errors(out, self.exact).mean())

    def operations(
        self, features: str, window_size: int | None, num_projections: int, num_sinks: int
    ) -> float:
        return favor_operations(
            self.length,
            self.dim,
            num_projections,
            window_size,
            num_sinks,
            self.is_causal,
            is_sharp=features == "sharp",
        )

    def _feature_map(
        self, features: str, num_projections: int, query_ratio: float, num_sinks: int
    ) -> SoftmaxFeatures | SharpFeatures:
        """As `FavorOptions.feature_map` makes it; calibrated, unless statistics are the call's."""
        name = (features, num_projections, query_ratio, num_sinks)
        if name not in self.maps:
            query, key, _ = self.seen
            phi: SoftmaxFeatures | SharpFeatures = SoftmaxFeatures(self.dim, num_projections)
            if features == "sharp":
                phi = SharpFeatures(
                    self.dim,
                    num_projections,
                    self.key_heads,
                    self.statistics,
                    query_ratio=query_ratio,
                )
            phi = phi.to(key.device)
            if isinstance(phi, SharpFeatures) and self.statistics == "calibrated":
                phi.calibrate(query, key, without_sinks(key, None, num_sinks), self.scale)
            self.maps[name] = phi
        return self.maps[name]


def _seconds(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """The median time of each call. A round makes every call once, so that disturbances reach all
    alike.

    A single thread on a CPU is measured by CPU time, which other processes disturb less.
    """
    times: list[list[float]] = []
    for _ in range(ROUNDS + 1):  # the first is to warm up
        times.append([])
        for call in calls:
            began = _now()
            device = call().device
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[-1].append(_now() - began)
    return [median(of) for of in zip(*times[1:], strict=True)]


def _now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
