"""The Gaussian kernel by random features, beside what scikit-learn has: error and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.kernel_approximation import Nystroem, RBFSampler
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer, StandardScaler

from performers.sklearn import (
    HyperbolicFeatures,
    OrthogonalRandomFeatures,
    PositiveFeatures,
    RandomKernelFeatures,
)
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE


@dataclass(frozen=True)
class Config:
    """A seed is a split of the data, 3 to 1, and a draw of every feature map."""

    data: tuple[str, ...] = ("digits", "breast_cancer")
    num_components: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    seeds: int = 20
    ridge: float = 0.1
    seed: int = 0


PAPER = Config()
REDUCED = replace(PAPER, num_components=PAPER.num_components[:5], seeds=5)
SMOKE = replace(REDUCED, data=("breast_cancer",), num_components=(16, 64), seeds=3)
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": PAPER}

DATA = {"digits": load_digits, "breast_cancer": load_breast_cancer}

ORTHOGONAL, INDEPENDENT = "sin and cos, orthogonal", "sin and cos, iid"
POSITIVE, HYPERBOLIC = "positive, orthogonal", "hyperbolic, orthogonal"
SAMPLER, NYSTROEM = "RBFSampler", "Nystroem"

METHODS = {
    ORTHOGONAL: OrthogonalRandomFeatures,
    INDEPENDENT: partial(RandomKernelFeatures, "rbf", projection="iid"),
    SAMPLER: RBFSampler,
    NYSTROEM: Nystroem,
    HYPERBOLIC: partial(HyperbolicFeatures, kernel="rbf"),
    POSITIVE: partial(PositiveFeatures, kernel="rbf"),
}


def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    results: dict[str, Any] = {"scikit-learn": metadata.version("scikit-learn"), "data": {}}
    for name in config.data:
        features, labels = DATA[name](return_X_y=True)
        found = {
            "error": {method: [[] for _ in config.num_components] for method in METHODS},
            "accuracy": {method: [[] for _ in config.num_components] for method in METHODS},
            "exact_accuracy": [],
        }
        for seed in range(config.seed, config.seed + config.seeds):
            report(f"{name}, seed {seed}")
            _one_seed(config, features, labels, seed, found)
        results["data"][name] = found
    return results


def _one_seed(
    config: Config, features: np.ndarray, labels: np.ndarray, seed: int, found: dict[str, Any]
) -> None:
    """One split: the exact kernel, then every method at every number of components."""
    train, test, train_labels, test_labels = train_test_split(
        features, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    gamma = 1 / (train.shape[1] * train.var())
    kernel = rbf_kernel(test, gamma=gamma)
    exact = KernelRidge(alpha=config.ridge, kernel="rbf", gamma=gamma)
    binarizer = LabelBinarizer(neg_label=-1).fit(train_labels)
    exact.fit(train, binarizer.transform(train_labels))
    predicted = binarizer.inverse_transform(exact.predict(test), threshold=0)
    found["exact_accuracy"].append(float(np.mean(predicted == test_labels)))
    for method, build in METHODS.items():
        for index, count in enumerate(config.num_components):
            if method == NYSTROEM and count > len(train):
                continue  # its components are training rows
            phi = build(n_components=count, gamma=gamma, random_state=seed)
            train_features, test_features = phi.fit(train).transform(train), phi.transform(test)
            error = np.linalg.norm(test_features @ test_features.T - kernel)
            found["error"][method][index].append(float(error / np.linalg.norm(kernel)))
            # Without intercept its limit of many components is the kernel ridge above.
            model = RidgeClassifier(alpha=config.ridge, fit_intercept=False)
            accuracy = model.fit(train_features, train_labels).score(test_features, test_labels)
            found["accuracy"][method][index].append(float(accuracy))


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with rc_context(STYLE):
        drawn = Figure(figsize=(9.6, 3.9 * len(results["data"])), layout="constrained")
        rows = drawn.subplots(len(results["data"]), 2, squeeze=False)
        for (error, accuracy), (name, found) in zip(rows, results["data"].items(), strict=True):
            _curves(error, config["num_components"], found["error"])
            _curves(accuracy, config["num_components"], found["accuracy"])
            accuracy.axhline(
                np.mean(found["exact_accuracy"]),
                color=BASELINE_COLOR,
                linestyle="-.",
                label="exact kernel",
            )
            error.set(yscale="log", title=f"{name}: relative error of the kernel matrix")
            accuracy.set(title=f"{name}: accuracy of ridge classification")
        rows[0, 1].legend(fontsize=8)
    return drawn


def _curves(axes: Any, counts: list[int], values: dict[str, list[list[float]]]) -> None:
    colors = (COLORS[0], COLORS[0], COLORS[1], COLORS[2], COLORS[3], COLORS[3])
    lines = ("-", "--", "--", "-", "-", ":")
    for (method, per_count), color, line in zip(values.items(), colors, lines, strict=True):
        known = [(count, v) for count, v in zip(counts, per_count, strict=True) if v]
        shown = [count for count, _ in known]
        mean = np.array([np.mean(v) for _, v in known])
        low, high = (np.array([np.quantile(v, q) for _, v in known]) for q in (0.1, 0.9))
        axes.plot(shown, mean, line, color=color, marker="o", markersize=3, label=method)
        axes.fill_between(shown, low, high, color=color, alpha=0.1, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("number of components")


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    parts = []
    for name, found in results["data"].items():
        exact = found["exact_accuracy"]
        parts += [
            f"**{name}**: the exact kernel is right on {_spread(exact, 1, 100)} % of the held-out "
            "quarter.",
            "",
            *_table("relative error of K", config, found["error"], digits=3, factor=1),
            "",
            *_table("accuracy, %", config, found["accuracy"], digits=1, factor=100),
            "",
        ]
    data = results["data"].values()
    orthogonal = _wins([found["error"] for found in data], ORTHOGONAL, INDEPENDENT)
    sampler = _wins([found["error"] for found in data], ORTHOGONAL, SAMPLER)
    nystroem = _wins([found["error"] for found in data], ORTHOGONAL, NYSTROEM)
    signed = _wins([found["error"] for found in data], ORTHOGONAL, HYPERBOLIC)
    hyperbolic = _wins([found["error"] for found in data], HYPERBOLIC, POSITIVE)
    return "\n".join(
        [
            *parts,
            "| mean error over the seeds | lower at |",
            "|---|---|",
            f"| orthogonal sin and cos, than independent ones (Section 2.4) | {orthogonal} |",
            f"| orthogonal sin and cos, than `RBFSampler` | {sampler} |",
            f"| orthogonal sin and cos, than `Nystroem` | {nystroem} |",
            f"| orthogonal sin and cos, than hyperbolic features | {signed} |",
            f"| hyperbolic features, than as many positive ones (Lemma 2) | {hyperbolic} |",
            "",
            f"scikit-learn {results['scikit-learn']}.",
        ]
    )


def _table(
    what: str, config: dict[str, Any], values: dict[str, Any], *, digits: int, factor: float
) -> list[str]:
    counts = config["num_components"]
    return [
        f"| {what} | {' | '.join(map(str, counts))} |",
        f"|---|{'---|' * len(counts)}",
        *(
            f"| {method} | {' | '.join(_spread(v, digits, factor) for v in per_count)} |"
            for method, per_count in values.items()
        ),
    ]


def _spread(values: list[float], digits: int, factor: float) -> str:
    if not values:
        return "–"
    mean, deviation = factor * np.mean(values), factor * np.std(values, ddof=1)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _wins(tables: list[dict[str, list[list[float]]]], better: str, worse: str) -> str:
    pairs = [pair for table in tables for pair in zip(table[better], table[worse], strict=True)]
    wins = [np.mean(b) < np.mean(w) for b, w in pairs if b and w]
    return f"{sum(wins)} of {len(wins)} sizes"
