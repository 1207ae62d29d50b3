"""The tasks of Long Range Arena: what a model reads, and from where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from performers.data.declarations import DECLARATIONS, match_pieces
from performers.data.fetch import read_package
from performers.data.gray_images import FASHION_MNIST, shrink_images
from performers.data.labeled import PADDING, LabeledSequences
from performers.data.list_operations import SYMBOLS, ListOperations, draw_list_operations
from performers.data.long_range_arena import (
    read_cifar,
    read_document_pairs,
    read_list_operations,
    read_pathfinder,
    read_reviews,
)
from performers.data.mail import SPAM_ASSASSIN, Mail, classify_mail
from performers.data.pathfinder import PATH_X, PATHFINDER, Pathfinder, draw_pathfinder
from performers.data.text import paragraphs
from performers.reproduction import read_texts

# Where texts and images come from: files of this repository and scikit-learn's digits; packages
# that are downloaded; the benchmark's own files, which have to be in this folder.
CHECKOUT, PACKAGES, OFFICIAL = "checkout", "packages", "official files"
RELEASE = Path("lra_release")

BYTES = 256


class Split(NamedTuple):
    """Sequences to train on and to test with, and where they are from."""

    train: LabeledSequences
    test: LabeledSequences
    origin: dict[str, Any]


@dataclass(frozen=True)
class Amount:
    """How much of a task: the length of a sequence, and how many of them."""

    length: int
    num_train: int
    num_test: int


@dataclass(frozen=True)
class Task:
    """`prepare`: its sequences, from one of the sources. `is_pair`: whether two sequences are
    compared. `is_padded`: whether `PADDING` fills them up; to an image it is black. `shortcut`: the
    accuracy, on what it is tested with, of a rule that does not do the task, fitted to the rest.
    """

    prepare: Callable[[Amount, str, int, Callable[[str], None]], Split]
    num_labels: int
    vocab_size: int = BYTES
    is_pair: bool = False
    is_padded: bool = False
    shortcut: Callable[[Split], float] | None = None

    def inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """What a model is called with."""
        named = {"": tokens}
        if self.is_pair:
            named = {"": tokens[:, 0], "second_": tokens[:, 1]}
        found = {f"{name}input_ids": x.long() for name, x in named.items()}
        if self.is_padded:
            found |= {f"{name}attention_mask": x != PADDING for name, x in named.items()}
        return found


Report = Callable[[str], None]


def _list_operations(amount: Amount, source: str, seed: int, report: Report) -> Split:
    if source == OFFICIAL:
        train, test = (
            read_list_operations(RELEASE / f"listops-1000/basic_{part}.tsv", amount.length)
            for part in ("train", "test")
        )
        return _cut(train, test, amount)
    sizes = ListOperations(min_length=amount.length // 4, max_length=amount.length)
    # One draw, so that no expression is in both.
    drawn = draw_list_operations(amount.num_train + amount.num_test, sizes, seed)
    return _cut(_part(drawn, amount.num_test, None), drawn, amount, {"drawn": repr(sizes)})


def _paragraphs(report: Report) -> tuple[list[tuple[str, bytes]], dict[str, Any]]:
    """Of two novels, each with its title."""
    texts, origin = read_texts("excerpts", report)
    found = [(title, part.encode()) for title in sorted(texts) for part in paragraphs(texts[title])]
    return found, {"excerpts": sorted(texts), **origin}


def _mails(source: str, report: Report) -> tuple[list[Mail], dict[str, Any]]:
    """Mail or, in its place, paragraphs of two novels, of which one counts as spam."""
    if source == PACKAGES:
        return read_package(SPAM_ASSASSIN, report=report)
    found, origin = _paragraphs(report)
    return [Mail(part, title == found[0][0]) for title, part in found], origin


def _documents(source: str, report: Report) -> tuple[list[bytes], dict[str, Any]]:
    """One text in many languages or, in its place, paragraphs of novels."""
    if source == PACKAGES:
        return read_package(DECLARATIONS, report=report)
    found, origin = _paragraphs(report)
    return [part for _, part in found], origin


def _text(amount: Amount, source: str, seed: int, report: Report) -> Split:
    if source == OFFICIAL:
        train, test = (
            read_reviews(RELEASE / "aclImdb" / part, amount.length) for part in ("train", "test")
        )
        return _cut(_shuffled(train, seed), _shuffled(test, seed), amount)
    mails, origin = _mails(source, report)
    return _cut(*classify_mail(mails, amount.length, amount.num_test, seed), amount, origin)


def _matching(amount: Amount, source: str, seed: int, report: Report) -> Split:
    if source == OFFICIAL:
        train, test = (
            read_document_pairs(RELEASE / f"tsv_data/new_aan_pairs.{part}.tsv", amount.length)
            for part in ("train", "test")
        )
        return _cut(_shuffled(train, seed), _shuffled(test, seed), amount)
    documents, origin = _documents(source, report)
    return _cut(*match_pieces(documents, amount.length, amount.num_test, seed), amount, origin)


def _image(amount: Amount, source: str, seed: int, report: Report) -> Split:
    if source == OFFICIAL:
        folder = RELEASE / "cifar-10-batches-bin"
        train = read_cifar([folder / f"data_batch_{number}.bin" for number in range(1, 6)])
        return _cut(train, read_cifar([folder / "test_batch.bin"]), amount)
    if source == PACKAGES:
        found, origin = read_package(FASHION_MNIST, report=report)
        train, test = (shrink_images(part, math.isqrt(amount.length)) for part in found)
        return _cut(train, test, amount, origin)
    from sklearn.datasets import load_digits

    digits = load_digits()
    drawn = LabeledSequences(
        torch.from_numpy((digits.data * 15).astype(np.uint8)), torch.from_numpy(digits.target)
    )
    origin = {"package": "scikit-learn, load_digits"}
    return _cut(_part(drawn, amount.num_test, None), drawn, amount, origin)


def _pathfinder(
    options: Pathfinder, folder: str | None = None, levels: int = BYTES
) -> Callable[..., Split]:
    """From a folder of the benchmark, or drawn, in so many grays."""

    def prepare(amount: Amount, source: str, seed: int, report: Report) -> Split:
        if source == OFFICIAL and folder is not None:
            found = read_pathfinder(RELEASE / folder)
            tenth = len(found) // 10
            return _cut(_part(found, 0, 8 * tenth), _part(found, 9 * tenth, None), amount)
        drawn = replace(options, size=math.isqrt(amount.length))
        count = amount.num_train + amount.num_test
        report(f"drawing {count:,} images of {drawn.size} × {drawn.size} pixels")
        found = draw_pathfinder(count, drawn, seed)
        found = replace(found, tokens=found.tokens // (BYTES // levels))
        return _cut(_part(found, amount.num_test, None), found, amount, {"drawn": repr(drawn)})

    return prepare


def by_distance(split: Split) -> float:
    """Calling dots connected that are neither nearer nor further apart than two bounds."""
    fitted, tested = _distances(split.train), _distances(split.test)
    bounds = fitted.quantile(torch.linspace(0, 1, 41))
    bands = [(low, high) for low in bounds for high in bounds if low < high]

    def accuracy(distances: Tensor, labels: Tensor, band: tuple[Tensor, Tensor]) -> float:
        inside = (distances >= band[0]) & (distances <= band[1])
        return float((inside == labels.bool()).float().mean())

    best = max(bands, key=lambda band: accuracy(fitted, split.train.labels, band))
    return accuracy(tested, split.test.labels, best)


def by_histogram(split: Split) -> float:
    """Calling pieces of one document whose histograms of bytes are more alike than a bound."""
    fitted, tested = _likenesses(split.train), _likenesses(split.test)
    bounds = fitted.quantile(torch.linspace(0, 1, 41))

    def accuracy(likenesses: Tensor, labels: Tensor, bound: Tensor) -> float:
        return float(((likenesses > bound) == labels.bool()).float().mean())

    best = max(bounds, key=lambda bound: accuracy(fitted, split.train.labels, bound))
    return accuracy(tested, split.test.labels, best)


def _likenesses(data: LabeledSequences) -> Tensor:
    """Σ √(p q) over the shares of all bytes in both sequences of a pair."""
    tokens = data.tokens.long()
    counts = torch.zeros(*tokens.shape[:2], BYTES).scatter_add_(2, tokens, torch.ones(tokens.shape))
    counts[..., PADDING] = 0
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return shares.sqrt().prod(1).sum(-1)


def _distances(data: LabeledSequences) -> Tensor:
    """Pixels from dot to dot; 0 where they overlap. Nothing but a dot has the brightest gray."""
    side = math.isqrt(data.tokens.shape[-1])
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    is_dot = data.tokens == GRAYS - 1
    first = places[is_dot.int().argmax(1)]
    # The first bright pixel of a dot is at most its diameter from all others.
    is_near = (places - first[:, None]).abs().amax(-1) <= side // 8
    centers = [
        (chosen.float() @ places.float()) / chosen.sum(1, keepdim=True).clamp(min=1)
        for chosen in (is_dot & is_near, is_dot & ~is_near)
    ]
    apart = (centers[0] - centers[1]).norm(dim=1)
    return apart.where((is_dot & ~is_near).any(1), torch.tensor(0.0))


def _cut(
    train: LabeledSequences,
    test: LabeledSequences,
    amount: Amount,
    origin: dict[str, Any] | None = None,
) -> Split:
    """The first so many of both. Raises ValueError where a sequence has another length."""
    for found in (train, test):
        if found.tokens.shape[-1] != amount.length:
            raise ValueError(
                f"sequences must have the length of the config, {amount.length}: these have "
                f"{found.tokens.shape[-1]}."
            )
    return Split(
        _part(train, 0, amount.num_train),
        _part(test, 0, amount.num_test),
        origin or {"files": str(RELEASE)},
    )


def _part(whole: LabeledSequences, start: int, stop: int | None) -> LabeledSequences:
    return LabeledSequences(whole.tokens[start:stop], whole.labels[start:stop])


def _shuffled(whole: LabeledSequences, seed: int) -> LabeledSequences:
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    return LabeledSequences(whole.tokens[order], whole.labels[order])


# So few that a gray by itself tells a dot from a dash.
GRAYS = 4

# Two dashes and a short distractor, for images of a few hundred pixels at most.
SHORT = replace(PATHFINDER, num_dashes=2, num_distractors=1, distractor_dashes=1, dot_radius=1.0)

TASKS = {
    "listops": Task(
        _list_operations, num_labels=10, vocab_size=PADDING + 1 + len(SYMBOLS), is_padded=True
    ),
    "text": Task(_text, num_labels=2, is_padded=True),
    "retrieval": Task(_matching, num_labels=2, is_pair=True, is_padded=True, shortcut=by_histogram),
    "image": Task(_image, num_labels=10),
    "pathfinder-short": Task(
        _pathfinder(SHORT, levels=GRAYS), num_labels=2, vocab_size=GRAYS, shortcut=by_distance
    ),
    "pathfinder": Task(
        _pathfinder(PATHFINDER, "pathfinder32/curv_contour_length_14"), num_labels=2
    ),
    "path-x": Task(_pathfinder(PATH_X, "pathfinder128/curv_contour_length_14"), num_labels=2),
}


def load(path: Path, name: str, amount: Amount, source: str, seed: int, report: Report) -> Split:
    """The sequences of a task, from a file that is written the first time."""
    if path.exists():
        with np.load(path) as stored:
            parts = [
                LabeledSequences(*(torch.from_numpy(stored[f"{part} {what}"]) for what in WHAT))
                for part in PARTS
            ]
            return Split(*parts, json.loads(str(stored["origin"])))
    report(f"preparing {name}")
    split = TASKS[name].prepare(amount, source, seed, report)
    arrays = {
        f"{part} {what}": getattr(getattr(split, part), what).numpy()
        for part in PARTS
        for what in WHAT
    }
    unfinished = path.with_suffix(".part.npz")
    np.savez_compressed(unfinished, origin=json.dumps(split.origin), **arrays)
    unfinished.replace(path)
    return split


PARTS, WHAT = ("train", "test"), ("tokens", "labels")
