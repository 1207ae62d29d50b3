"""What the paper claims, and what the numbers of an experiment say of each claim."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

from performers.reproduction.means import Mean

__all__ = ["CLAIMS", "Claim"]

ALIKE, KINDS = 0.05, ("Performer-ReLU", "Reformer")  # bits per dimension of Figure 7, left

HOLDS, IN_PART, NOT_HERE = "holds", "holds in part", "does not show at our scale"
Found = tuple[str, str]  # a verdict, and the figures it comes from


class Claim(NamedTuple):
    where: str  # in the paper
    says: str
    experiment: str
    find: Callable[[dict[str, Any]], Found]


def _verdict(holds: list[bool]) -> str:
    return HOLDS if all(holds) else IN_PART if any(holds) else NOT_HERE


def _lemma_2(results: dict[str, Any]) -> Found:
    rows = results["slice"]
    better = [row["kernel"] for row in rows if row["trigonometric"] > row["positive"]]
    worse = [row["kernel"] for row in rows if row["trigonometric"] <= row["positive"]]
    least = min(rows, key=lambda row: row["kernel"])
    ratio = least["trigonometric"] / least["positive"]
    return _verdict([max(better) <= min(worse)]), (
        f"below a kernel of {max(better):.2f} they are, at {least['kernel']:.2f} by a factor of "
        f"{ratio:,.0f} in the mean squared error; above it trigonometric ones are"
    )


def _theorem_1(results: dict[str, Any]) -> Found:
    rows = results["rows"]
    bounded = [row["bound"] <= row["ratio"] <= 1 for row in rows]
    return _verdict(bounded), f"at {sum(bounded)} of {len(rows)} settings"


def _theorem_2(results: dict[str, Any]) -> Found:
    rows = [row for row in results["against_dim"] if row["kind"] == "orthogonal"]
    larger = [row["exact"] >= row["bound"] for row in rows]
    last = rows[-1]
    share = last["exact"] / last["independent_error"]
    return _verdict(larger), (
        f"at {sum(larger)} of {len(rows)} dims; at d = {last['dim']} orthogonal rows take "
        f"{share:.0%} off the error"
    )


def _figure_3_time(results: dict[str, Any]) -> Found:
    found, holds = [], []
    for size in ("regular", "small"):
        rows = [row for row in results["times"] if row["size"] == size]
        both = [
            (row["length"], row["seconds"]) for row in rows if not _missing(row["seconds"]["exact"])
        ]
        length, seconds = both[-1]
        ours, exact, floor = (
            seconds[name]["forward_backward"]["median"]
            for name in ("performer-positive", "exact", "identity")
        )
        holds += [ours < exact, ours < 1.5 * floor]
        found.append(
            f"{size}, L = {length:,}: {ours / exact:.2f} of the Transformer's time, "
            f"{ours / floor:.1f} of X's"
        )
    return _verdict(holds), "; ".join(found)


def _missing(seconds: dict[str, Any] | str) -> bool:
    return isinstance(seconds, str) or isinstance(seconds["forward_backward"], str)


def _figure_3_memory(results: dict[str, Any]) -> Found:
    row = max(results["memory"], key=lambda row: (row["size"] == "regular", row["length"]))
    ratio = row["bytes"]["performer-positive"] / row["bytes"]["identity"]
    return _verdict([ratio < 1.5]), (
        f"regular, L = {row['length']:,}: {ratio:.2f} of X's. Exact attention keeps no matrix "
        "either where it is fused, so the Transformer's memory is linear too"
    )


def _figure_4(better: str, worse: str) -> Callable[[dict[str, Any]], Found]:
    def find(results: dict[str, Any]) -> Found:
        holds, found = [], []
        for setting in results["settings"]:
            ours, theirs = (setting["errors"][name] for name in (better, worse))
            lower = [mean(a) < mean(b) for a, b in zip(ours, theirs, strict=True)]
            holds += lower
            found.append(
                f"{sum(lower)} of {len(lower)} values of m at deviation {setting['deviation']}"
            )
        return _verdict(holds), ", ".join(found)

    return find


def _figure_5_left(results: dict[str, Any]) -> Found:
    curves = results["curves"]
    exact = curves["exact attention, trained on"][-1][1]
    ours = {name: curves[name][-1][1] for name in ("FAVOR+", "sharp", "FAVOR+ with a window")}
    holds = [exact - accuracy < 0.01 for accuracy in ours.values()]
    gaps = ", ".join(f"{name} {100 * (exact - ours[name]):.1f}" for name in ours)
    return _verdict(holds), f"points below after a tenth of the steps: {gaps}"


def _figure_5_redrawing(results: dict[str, Any]) -> Found:
    redrawn, kept = (
        results["curves"][name][-1][1] for name in ("FAVOR+, redrawn", "FAVOR+, not redrawn")
    )
    return _verdict([redrawn > kept]), f"{redrawn:.1%} redrawn, {kept:.1%} not; one seed"


def _figure_5_smreg(results: dict[str, Any]) -> Found:
    regular, gaussian = (
        results["curves"][name][-1][1] for name in ("SMREG, redrawn", "FAVOR+, redrawn")
    )
    return _verdict([regular > gaussian]), f"{regular:.1%} against {gaussian:.1%}; one seed"


def _figure_14(results: dict[str, Any]) -> Found:
    layers = list(zip(*results["panels"]["trained weights"]["propagated"]["FAVOR+"], strict=True))
    first, last = mean(layers[0]), mean(layers[-1])
    return _verdict([last > 2 * first]), (
        f"relative error {first:.4f} after one layer, {last:.2f} after {len(layers)}"
    )


def _figure_15(results: dict[str, Any], name: str) -> Mean:
    """The loss at the end of the runs that came there."""
    rows = [row for row in results["rows"] if row["name"] == name and row["stopped"] is None]
    return Mean.of([row["curve"][-1][2] for row in rows])


def _figure_15_luck(results: dict[str, Any]) -> Found:
    kept = _figure_15(results, "kept")
    gains = [kept - _figure_15(results, name) for name in ("redrawn", "redrawn from the middle on")]
    changes = " and ".join(f"{-gain.value:+.3f} ± {gain.error:.3f}" for gain in gains)
    return _verdict([gain.is_above_0() == "yes" for gain in gains]), (
        f"with redrawing from the start, and from the middle on, the loss changes by {changes}"
    )


def _figure_15_features(results: dict[str, Any]) -> Found:
    positive, trigonometric, smreg = (
        _figure_15(results, name)
        for name in ("redrawn", "trigonometric, redrawn", "SMREG, redrawn")
    )
    above, below = trigonometric - positive, positive - smreg
    largest = {
        name: max(max(row["gradients"]) for row in results["rows"] if row["name"] == name)
        for name in ("redrawn", "trigonometric, redrawn")
    }
    ratio = largest["trigonometric, redrawn"] / largest["redrawn"]
    return _verdict([above.is_above_0() == "yes", below.is_above_0() == "yes"]), (
        f"trigonometric features end {above.value:.2f} ± {above.error:.2f} above positive ones, "
        f"with gradients up to {ratio:,.0f} times as large; SMREG {below.value:.3f} ± "
        f"{below.error:.3f} below"
    )


def _figure_7_left(results: dict[str, Any]) -> Found:
    bits = {
        (row["mechanism"], row["layers"]): row["curve"][-1][2] / log(2)
        for row in results["rows"]
        if row["stopped"] is None
    }
    shallow, deep = (sorted({layers for name, layers in bits if name == kind}) for kind in KINDS)
    gaps = {
        f"{layers} and {others} layers": bits[KINDS[0], layers] - bits[KINDS[1], others]
        for layers, others in zip(shallow, deep, strict=True)
    }
    gaps |= {
        f"{name} and ReLU": bits[name, shallow[0]] - bits[KINDS[0], shallow[0]]
        for name in ("Performer-softmax", "SMREG")
    }
    above = sorted({name for (name, _), value in bits.items() if value > results["marginal_bits"]})
    found = ", ".join(f"{gap:+.2f} ({between})" for between, gap in gaps.items())
    return _verdict([not above, *(gap <= ALIKE for gap in gaps.values())]), (
        f"bits more: {found}; above the marginal entropy: {', '.join(above) or 'none'}; one seed"
    )


def _figure_16_nan(results: dict[str, Any]) -> Found:
    stopped = [row for row in results["rows"] if row["stopped"] is not None]
    kernels = sorted({row["kernel"] for row in stopped})
    return _verdict([bool(stopped)]), (
        f"{len(stopped)} of {len(results['rows'])} runs, all of {', '.join(kernels) or 'none'}"
    )


def _figure_16_normalizer(results: dict[str, Any]) -> Found:
    largest = max(row["batch_size"] for row in results["rows"])
    ends: dict[tuple[str, bool], list[float]] = {}
    for row in results["rows"]:
        if row["batch_size"] == largest and row["stopped"] is None:
            ends.setdefault((row["kernel"], row["is_normalized"]), []).append(row["curve"][-1][2])
    lower = {
        kernel: mean(ends[kernel, False]) < mean(ends[kernel, True])
        for kernel, is_normalized in ends
        if not is_normalized and (kernel, True) in ends
    }
    return _verdict([any(lower.values())]), (
        f"in batches of {largest} the loss is lower without it for {sum(lower.values())} of "
        f"{len(lower)} kernels that came to the end"
    )


def _figure_18(results: dict[str, Any]) -> Found:
    rows = [row for row in results["rows"] if row["name"] == "Linear Transformer"]
    stopped = sum(row["stopped"] is not None for row in rows)
    published = results["errors"]["as published"]
    return _verdict([stopped == len(rows)] if stopped in (0, len(rows)) else [True, False]), (
        f"{stopped} of {len(rows)} runs end in NaN; far below 0 the usual elu(x) + 1 in float32 "
        f"has errors up to {max(published):.0%}, ours up to "
        f"{max(results['errors']['Linear Transformer']):.0e}"
    )


def _figure_19(results: dict[str, Any]) -> Found:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["mechanism"], []).append(row)
    exact, performer = rows["exact"], rows["performer-relu"]
    accuracy, of_exact = (mean(row["accuracy"] for row in of) for of in (performer, exact))
    speed = geometric_mean(
        (one["steps"] / one["seconds"]) / (other["steps"] / other["seconds"])
        for one, other in zip(performer, exact, strict=True)
    )
    learned = 0
    for row in performer:
        task = results["tasks"][row["task"]]
        chance = task["most_frequent"]
        error = (chance * (1 - chance) / task["test"]) ** 0.5
        learned += row["accuracy"] > chance + 2 * error
    # As published, its mean accuracy is 3 points below that of exact attention.
    return _verdict([speed > 1, accuracy > of_exact - 0.03, learned == len(performer)]), (
        f"{speed:.2f} times the steps of exact attention in the same time; mean accuracy "
        f"{accuracy:.1%} against {of_exact:.1%}, above chance in {learned} of {len(performer)} "
        "tasks; one seed"
    )


def _figure_20(results: dict[str, Any]) -> Found:
    deep = [row for row in results["layers"] if row["layers"] == 20]
    times = {
        row["length"]: row["seconds"]["forward_backward"]["median"]
        for row in deep
        if not isinstance(row["seconds"], str) and not _missing(row["seconds"])
    }
    (short, first), *_, (long, last) = times.items()
    growth = (last / first) / (long / short)
    return _verdict([growth < 1.2]), (
        f"20 layers: {last / first:.2f} times the time for {long // short} times the length"
    )


def _pieces(results: dict[str, Any]) -> Found:
    books = results["books"]
    returned = sum(book["is_returned"] for book in books)
    multipliers = {
        split: sum(book["pieces"] for book in of_split) / sum(book["words"] for book in of_split)
        for split in ("train", "valid", "test")
        if (of_split := [book for book in books if book["split"] == split])
    }
    found = ", ".join(f"{value:.2f} ({split})" for split, value in multipliers.items())
    verdict = _verdict([returned == len(books)])
    return verdict, f"{returned} of {len(books)} texts come back; pieces to a word: {found}"


def _baseline(results: dict[str, Any]) -> Found:
    accuracy, perplexity = (results["baseline"][key] for key in ("accuracy", "perplexity"))
    return _verdict([abs(accuracy - 0.0992) < 0.01, abs(perplexity - 17.80) < 0.5]), (
        f"{accuracy:.2%} and {perplexity:.2f} on Swiss-Prot"
    )


def _scores(runs: list[dict[str, Any]]) -> Mean:
    """The accuracy on the validation set over seeds."""
    return Mean.of([run["scores"]["valid"]["accuracy"] for run in runs])


def _figure_6_best(results: dict[str, Any]) -> Found:
    holds, found = [], []
    for direction, runs in results["runs"].items():
        reached = {name: _scores(of_seeds) for name, of_seeds in runs.items()}
        relu = reached.pop("Performer-ReLU")
        best = max(reached, key=lambda name: reached[name].value)
        holds.append((relu - reached[best]).is_above_0() == "yes")
        found.append(f"({direction}) {relu.percent()}, {best} {reached[best].percent()}")
    return _verdict(holds), _with_seeds(found, results["runs"])


def _figure_6_others(results: dict[str, Any]) -> Found:
    holds, found = [], []
    for direction, runs in results["runs"].items():
        exact = _scores(runs["Transformer"])
        for name in {"Reformer", "Linformer"} & set(runs):
            gap = exact - _scores(runs[name])
            holds.append(gap.is_above_0() == "yes")
            steps, of_exact = (mean(run["steps"] for run in runs[n]) for n in (name, "Transformer"))
            found.append(
                f"({direction}) {name} {gap.points()} after {steps:.0f} steps, not {of_exact:.0f}"
            )
    words = f"points below: {', '.join(sorted(found))}"
    return _verdict(holds), _with_seeds([words], results["runs"])


def _figure_7_right(results: dict[str, Any]) -> Found:
    reached = {name: _scores(of_seeds) for name, of_seeds in results["runs"].items()}
    performer, near = reached.pop("Performer"), reached.pop("Performer, near field")
    best = max(reached, key=lambda name: reached[name].value)
    holds = [(performer - reached[best]).is_above_0() == "yes"]
    found = [
        f"{performer.percent()}, with a near field {near.percent()}, the best small one ({best}) "
        f"{reached[best].percent()}"
    ]
    return _verdict(holds), _with_seeds(found, {"": results["runs"]})


def _with_seeds(found: list[str], runs: dict[str, dict[str, list[Any]]]) -> str:
    seeds = {len(of_seeds) for models in runs.values() for of_seeds in models.values()}
    return f"{'; '.join(found)}; seeds: {max(seeds)}"


def _figures_10_to_12(results: dict[str, Any]) -> Found:
    kinds = [head["kind"] for head in results["heads"]]
    counts = {kind: kinds.count(kind) for kind in ("local", "vertical", "global")}
    return _verdict([counts["vertical"] > 0, counts["local"] > 0]), (
        ", ".join(f"{count} {kind}" for kind, count in counts.items()) + f" of {len(kinds)} heads"
    )


def _figure_13(results: dict[str, Any]) -> Found:
    trained, untrained = (results["similarity"][name] for name in ("trained", "untrained"))
    return _verdict([trained["p"] < 0.05]), (
        f"correlation {trained['correlation']:+.2f} with BLOSUM62 (p = {trained['p']:.2g}); "
        f"untrained {untrained['correlation']:+.2f} (p = {untrained['p']:.2g})"
    )


CLAIMS = (
    Claim(
        "Section 2.3, Lemma 2, Figure 2",
        "where the kernel is small, positive features are the more accurate ones",
        "figure-2", _lemma_2,
    ),
    Claim("Theorem 1", "SMREG is between a bound and the softmax kernel", "theorem-1", _theorem_1),
    Claim(
        "Theorem 2", "orthogonal rows lower the error by a stated amount at least",
        "orthogonality-gap", _theorem_2,
    ),
    Claim(
        "Section 4.1, Figure 3", "a Performer's time is linear, and close to that of X",
        "figure-3", _figure_3_time,
    ),
    Claim(
        "Section 4.1, Figure 3", "its memory is linear, and close to that of X",
        "figure-3", _figure_3_memory,
    ),
    Claim(
        "Section 4.2, Figure 4", "orthogonal features are more accurate than independent ones",
        "figure-4", _figure_4("positive, orthogonal", "positive, iid"),
    ),
    Claim(
        "Section 4.2, Figure 4", "positive features are more accurate than trigonometric ones",
        "figure-4", _figure_4("positive, orthogonal", "trigonometric, orthogonal"),
    ),
    Claim(
        "Section 4.3, Figure 5 left",
        "a pretrained Transformer's accuracy comes back in a small fraction of the steps",
        "figure-5-left", _figure_5_left,
    ),
    Claim(
        "Section 4.3, Figure 5 right", "redrawing ω ends above keeping it",
        "figure-5-right", _figure_5_redrawing,
    ),
    Claim(
        "Section 4.3, Figure 5 right", "SMREG ends above Gaussian features",
        "figure-5-right", _figure_5_smreg,
    ),
    Claim(
        "Section 4.4, Figure 6, Table 2", "Performer-ReLU is the most accurate on proteins",
        "figure-6", _figure_6_best,
    ),
    Claim(
        "Section 4.4, Figure 6", "the Reformer and the Linformer are below the Transformer",
        "figure-6", _figure_6_others,
    ),
    Claim(
        "Section 4.5, Figure 7 left, Appendix D.2", "on images of 12,288 bytes a Performer matches "
        "a Reformer twice as deep; softmax and SMREG match ReLU", "figure-7-left", _figure_7_left,
    ),
    Claim(
        "Section 4.5, Figure 7 right", "a Performer beats small Transformers on windows of 8,192",
        "figure-7-right", _figure_7_right,
    ),
    Claim(
        "Appendix A.1.1", "a vocabulary of 32,768 pieces gives books back as they were; a word of "
        "PG-19 has 1.54 to 1.56 of them", "book-pieces", _pieces,
    ),
    Claim(
        "Appendix C.1", "empirical baseline of TrEMBL: accuracy 9.92 %, perplexity 17.80",
        "protein-statistics", _baseline,
    ),
    Claim(
        "Appendix C.4, Figures 10 to 12", "some heads are local, some vertical",
        "figures-10-to-13", _figures_10_to_12,
    ),
    Claim(
        "Appendix C.4, Figure 13", "attention knows which amino acids are similar",
        "figures-10-to-13", _figure_13,
    ),
    Claim("Appendix D.1, Figure 14", "errors grow through the layers", "figure-14", _figure_14),
    Claim(
        "Appendix D.2, Figure 15", "an unlucky ω holds a training back, and redrawing mends it",
        "figure-15", _figure_15_luck,
    ),
    Claim(
        "Appendix D.2, Figure 15", "trigonometric features train unstably, SMREG well",
        "figure-15", _figure_15_features,
    ),
    Claim(
        "Appendix D.3, Figures 16 and 17", "runs of certain kernels end in NaN",
        "figures-16-and-17", _figure_16_nan,
    ),
    Claim(
        "Appendix D.3, Figures 16 and 17", "leaving out the normalizer does not necessarily hurt",
        "figures-16-and-17", _figure_16_normalizer,
    ),
    Claim(
        "Appendix D.4, Figure 18", "trainings of the Linear Transformer explode",
        "figure-18", _figure_18,
    ),
    Claim(
        "Appendix D.5, Figure 19", "Performers are fast and accurate on the Long Range Arena",
        "long-range-arena", _figure_19,
    ),
    Claim("Appendix E, Figure 20", "20 layers, linear in the length", "figure-20", _figure_20),
)  # fmt: skip
