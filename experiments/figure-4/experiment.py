"""Figure 4: how well the output of attention is approximated, against m."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from performers import SoftmaxFeatures, favor_attention, softmax_attention
from performers.reproduction import kept, resumable_folder
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """Values are N(0, 1), queries and keys N(0, deviation²); softmax(QKᵀ/√dim) V, bidirectional.

    The paper's input is an "appropriately normalized random matrix". What that means decides the
    outcome, so several deviations are tried.
    """

    length: int = 4096
    dim: int = 16
    samples: int = 15
    deviations: tuple[float, ...] = (0.5, 0.7, 1.0)
    num_projections: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384)
    seed: int = 0


PAPER = Config()
REDUCED = replace(PAPER, length=1024, num_projections=(16, 64, 256, 1024))
SMOKE = replace(REDUCED, length=64, samples=3, num_projections=(16, 64))
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

# (projection, estimator) of our curves, from worst to best as the paper has them.
OURS = {
    "trigonometric, iid": ("iid", "trigonometric"),
    "trigonometric, orthogonal": ("orthogonal", "trigonometric"),
    "positive, iid": ("iid", "positive"),
    "positive, orthogonal": ("orthogonal", "positive"),
}
PEER = "performer-pytorch"


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    has_peer = importlib.util.find_spec("performer_pytorch") is not None
    mechanisms: dict[str, Callable[..., Tensor]] = {
        name: _ours(projection, estimator) for name, (projection, estimator) in OURS.items()
    }
    if has_peer:
        mechanisms[PEER] = _performer_pytorch
    settings = []
    with resumable_folder("figure-4", config) as folder:
        for deviation in config.deviations:
            samples = []
            for sample in range(config.samples):
                report(f"deviation {deviation}, sample {sample + 1} of {config.samples}")
                measure = partial(_of_sample, config, mechanisms, deviation, config.seed + sample)
                samples.append(kept(folder / f"{deviation}-{sample}.json", measure))
            errors = {
                name: [
                    list(of_m) for of_m in zip(*(x["errors"][name] for x in samples), strict=True)
                ]
                for name in mechanisms
            }
            uniform = [x["uniform"] for x in samples]
            settings.append({"deviation": deviation, "errors": errors, "uniform": uniform})
    return {
        "settings": settings,
        "peers": {PEER: metadata.version(PEER) if has_peer else None},
    }


def _of_sample(
    config: Config, mechanisms: Mapping[str, Callable[..., Tensor]], deviation: float, seed: int
) -> dict[str, Any]:
    """The errors of each mechanism at every number of projections, and of averaging the values."""
    shape = (3, 1, 1, config.length, config.dim)
    query, key, value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).unbind()
    query, key = deviation * query, deviation * key
    exact = softmax_attention(query, key, value)
    return {
        "errors": {
            name: [
                _mean_squared_error(attend(query, key, value, num_projections, seed), exact)
                for num_projections in config.num_projections
            ]
            for name, attend in mechanisms.items()
        },
        "uniform": _mean_squared_error(value.mean(dim=2, keepdim=True), exact),
    }


def _ours(projection: str, estimator: str) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, count: int, seed: int) -> Tensor:
        phi = SoftmaxFeatures(query.shape[-1], count, estimator, projection, seed=seed, layer=count)
        return favor_attention(query, key, value, phi)

    return attend


def _performer_pytorch(
    query: Tensor, key: Tensor, value: Tensor, num_projections: int, seed: int
) -> Tensor:
    """A peer that runs only where it is installed."""
    from performer_pytorch import FastAttention

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        attention = FastAttention(query.shape[-1], nb_features=num_projections)
    return attention(query, key, value)


def _mean_squared_error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact.double()).square().mean())


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with rc_context(STYLE):
        settings = results["settings"]
        drawn = Figure(figsize=(4.2 * len(settings), 5.0), layout="constrained")
        panels = drawn.subplots(1, len(settings), squeeze=False)[0]
        for axes, setting in zip(panels, settings, strict=True):
            _draw(axes, config, setting)
        panels[0].set_ylabel("mean squared error of the output")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
        drawn.suptitle(
            f"L = {config['length']}, d = {config['dim']}; mean and deviation over "
            f"{config['samples']} samples",
            fontsize=10,
        )
    return drawn


def _draw(axes: Any, config: dict[str, Any], setting: dict[str, Any]) -> None:
    counts = torch.tensor(config["num_projections"], dtype=torch.float64)
    colors = (COLORS[1], COLORS[1], COLORS[0], COLORS[0], COLORS[2])
    lines = ("--", "-", "--", "-", ":")
    for (name, samples), color, line in zip(setting["errors"].items(), colors, lines, strict=False):
        per_sample = torch.tensor(samples, dtype=torch.float64)
        mean, deviation = per_sample.mean(1), per_sample.std(1)
        axes.plot(counts, mean, line, color=color, marker="o", markersize=3.5, label=name)
        # On a logarithmic axis a mean less a larger deviation has no place: stop at the least.
        lower = torch.maximum(mean - deviation, per_sample.amin(1))
        axes.fill_between(counts, lower, mean + deviation, color=color, alpha=0.1, linewidth=0)
    uniform = sum(setting["uniform"]) / len(setting["uniform"])
    axes.axhline(
        uniform, color=BASELINE_COLOR, linewidth=1.2, linestyle="-.", label="averaging the values"
    )
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        xlabel="number of projections m",
        title=f"queries and keys of deviation {setting['deviation']}",
    )
    axes.set_xticks(counts, [f"{int(count)}" for count in counts])


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    counts = config["num_projections"]
    lines = []
    for setting in results["settings"]:
        uniform = sum(setting["uniform"]) / len(setting["uniform"])
        lines += [
            f"| deviation {setting['deviation']} | "
            f"{' | '.join(f'm = {count}' for count in counts)} |",
            f"|---|{'---|' * len(counts)}",
            *(
                f"| {name} | {' | '.join(f'{e:.2g}' for e in _means(samples))} |"
                for name, samples in setting["errors"].items()
            ),
            f"| averaging the values | {' | '.join([f'{uniform:.2g}'] * len(counts))} |",
            "",
        ]
    settings = results["settings"]
    heads = " | ".join(f"deviation {setting['deviation']}" for setting in settings)

    def row(claim: str, of: Callable[[dict[str, Any]], str]) -> str:
        return f"| {claim} | {' | '.join(of(setting['errors']) for setting in settings)} |"

    lines += [
        f"| the paper: where a mean over {config['samples']} samples is lower | {heads} |",
        f"|---|{'---|' * len(settings)}",
        row(
            "orthogonal below iid, positive features",
            lambda errors: _wins(errors, "positive, orthogonal", "positive, iid", counts),
        ),
        row(
            "orthogonal below iid, trigonometric features",
            lambda errors: _wins(errors, "trigonometric, orthogonal", "trigonometric, iid", counts),
        ),
        row(
            "positive below trigonometric, iid",
            lambda errors: _wins(errors, "positive, iid", "trigonometric, iid", counts),
        ),
        row(
            "positive below trigonometric, orthogonal",
            lambda errors: _wins(
                errors, "positive, orthogonal", "trigonometric, orthogonal", counts
            ),
        ),
        row(
            f"error at m = {counts[-2]} over error at m = {counts[-1]}, positive orthogonal",
            lambda errors: _last_fall(errors["positive, orthogonal"]),
        ),
    ]
    version = results["peers"][PEER]
    if version is None:
        lines.append(f"\n{PEER} was not installed.")
    else:
        lines.append(row(f"the same, {PEER} {version}", lambda errors: _last_fall(errors[PEER])))
    return "\n".join(lines)


def _means(samples: list[list[float]]) -> list[float]:
    return [sum(errors) / len(errors) for errors in samples]


def _wins(errors: dict[str, list[list[float]]], better: str, worse: str, counts: list[int]) -> str:
    pairs = zip(_means(errors[better]), _means(errors[worse]), strict=True)
    wins = [str(count) for count, (b, w) in zip(counts, pairs, strict=True) if b < w]
    if len(wins) == len(counts):
        return "every m"
    return f"m = {', '.join(wins)}" if wins else "no m"


def _last_fall(samples: list[list[float]]) -> str:
    *_, before, last = _means(samples)
    return f"{before / last:.2f}"
