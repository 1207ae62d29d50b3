"""How well log Σ_j exp(h·e_j) over a large vocabulary is estimated, against m and the norms."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy

from performers import SharpFeatures, SoftmaxFeatures
from performers.functional import approximate_cross_entropy
from performers.typing import FeatureMap
from performers.viz.figures import COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """Hidden states and embeddings are Gaussian with E‖·‖² = norm²; targets are drawn by softmax.

    `offset` is the part of norm² that all hidden states share, and all embeddings, in one direction
    each: trained models have such a mean.
    """

    vocabulary: int = 16_384
    targets: int = 256
    dims: tuple[int, ...] = (4, 16, 64)
    norms: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    num_features: tuple[int, ...] = (256, 1024, 4096)
    offset: float = 0.5
    draws: int = 3
    seed: int = 0


PAPER = Config()
REDUCED = replace(PAPER, vocabulary=4096, num_features=PAPER.num_features[:2])
SMOKE = replace(
    REDUCED, vocabulary=512, targets=64, dims=(4, 64), norms=(1.0, 4.0), num_features=(64, 256)
)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

POSITIVE, HYPERBOLIC, SHARP, SAMPLED = "positive", "hyperbolic", "sharp", "sampled tokens"


def _hyperbolic(dim: int, num_features: int, seed: int) -> FeatureMap:
    return SoftmaxFeatures(dim, num_features // 2, estimator="hyperbolic", seed=seed)


def _sharp(dim: int, num_features: int, seed: int) -> FeatureMap:
    return SharpFeatures(dim, num_features, statistics="call", seed=seed)


# Feature maps of a given width: each costs the same per query.
FEATURE_MAPS: dict[str, Callable[..., FeatureMap]] = {
    POSITIVE: SoftmaxFeatures,
    HYPERBOLIC: _hyperbolic,
    SHARP: _sharp,
}
NAMES = (*FEATURE_MAPS, SAMPLED)


@torch.no_grad()
def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    rows = []
    for dim in config.dims:
        for norm in config.norms:
            report(f"dim {dim}, norm {norm:g}")
            rows += _rows(config, dim, norm)
    return {"rows": rows}


def _rows(config: Config, dim: int, norm: float) -> list[dict[str, Any]]:
    """The errors at every number of features."""
    generator = Generator().manual_seed(config.seed)
    hidden, embeddings = (
        _vectors(count, dim, norm, config.offset, generator)
        for count in (config.targets, config.vocabulary)
    )
    logits = hidden @ embeddings.mT
    targets = logits.softmax(dim=1).multinomial(1, generator=generator).squeeze(1)
    exact = cross_entropy(logits, targets, reduction="none")
    rows = []
    for count in config.num_features:
        errors: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        for draw in range(config.draws):
            for name, build in FEATURE_MAPS.items():
                phi = build(dim, count, seed=config.seed + draw)
                loss = approximate_cross_entropy(hidden, embeddings, targets, phi, reduction="none")
                errors[name].append(loss - exact)
            sampled = _sampled_cross_entropy(logits, targets, count, generator)
            errors[SAMPLED].append(sampled - exact)
        row = {"dim": dim, "norm": norm, "num_features": count, "exact_loss": float(exact.mean())}
        for name, per_draw in errors.items():
            error = torch.stack(per_draw)
            row[name] = {"bias": float(error.mean()), "rms": float(error.square().mean().sqrt())}
        rows.append(row)
    return rows


def _vectors(count: int, dim: int, norm: float, offset: float, generator: Generator) -> Tensor:
    shared = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
    own = torch.randn(count, dim, generator=generator) / math.sqrt(dim)
    return norm * (math.sqrt(offset) * shared + math.sqrt(1 - offset) * own)


def _sampled_cross_entropy(
    logits: Tensor, targets: Tensor, count: int, generator: Generator
) -> Tensor:
    """What is usual: the exact target, and for the others the mean over a uniform sample of tokens.

    Every target has a sample of its own; `count` products of dim per target, as with features.
    """
    vocabulary = logits.shape[1]
    shape = (len(targets), count)
    # 1 … V − 1 places after the target, around the end: any token but the target
    steps = torch.randint(1, vocabulary, shape, generator=generator)
    sampled = logits.gather(1, (targets[:, None] + steps) % vocabulary)
    log_others = sampled.logsumexp(dim=1) + math.log((vocabulary - 1) / count)
    own = logits.gather(1, targets[:, None]).squeeze(1)
    return torch.nn.functional.softplus(log_others - own)


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    counts, dims, norms = (config[name] for name in ("num_features", "dims", "norms"))
    with rc_context(STYLE):
        drawn = Figure(figsize=(2.5 * len(norms), 2.7 * len(dims)), layout="constrained")
        panels = drawn.subplots(len(dims), len(norms), squeeze=False, sharex=True, sharey=True)
        for (i, dim), (j, norm) in itertools.product(enumerate(dims), enumerate(norms)):
            axes = panels[i, j]
            rows = [row for row in results["rows"] if (row["dim"], row["norm"]) == (dim, norm)]
            for color, name in zip(COLORS, NAMES, strict=False):
                rms = [row[name]["rms"] for row in rows]
                axes.plot(counts, rms, color=color, marker="o", markersize=3, label=name)
            axes.set_xscale("log", base=4)
            axes.set_xticks(counts, [str(count) for count in counts], fontsize=8)
            axes.set(yscale="log", title=f"d = {dim}, norm {norm:g}")
        panels[0, 0].legend(fontsize=8)
        drawn.supxlabel("features m", fontsize=10)
        drawn.supylabel("rms error of the loss, nats", fontsize=10)
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    table = [
        f"| d | norm | exact loss | m | {' | '.join(NAMES)} |",
        f"|---|---|---|---|{'---|' * len(NAMES)}",
    ]
    rows = results["rows"]
    for row in rows:
        cells = [f"{row[name]['rms']:.3f} ({row[name]['bias']:+.3f})" for name in NAMES]
        start = (row["dim"], f"{row['norm']:g}", f"{row['exact_loss']:.2f}", row["num_features"])
        table.append(f"| {' | '.join(map(str, [*start, *cells]))} |")
    wins = Counter(min(NAMES, key=lambda name: row[name]["rms"]) for row in rows)
    return "\n".join(
        [
            "Root mean square error of the loss in nats (in brackets the mean error):",
            "",
            *table,
            "",
            f"Lowest error, of {len(rows)} rows: "
            f"{', '.join(f'{name} {wins[name]}' for name in NAMES)}.",
        ]
    )
