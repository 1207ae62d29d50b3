"""Blocks of a document that code writes, each between two comments that name it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["with_block", "write_block"]


def with_block(document: str, name: str, text: str) -> str:
    """The document with `text` between `<!-- name -->` and `<!-- /name -->`, whatever was there.

    Raises ValueError unless the document has one such block.

    >>> print(with_block("Before. <!-- speed --> ? <!-- /speed --> After.", "speed", "Fast."))
    Before. <!-- speed -->
    Fast.
    <!-- /speed --> After.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    # A function, because a backslash in a replacement text would mean something.
    document, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}",
        lambda _: f"{begin}\n{text.strip()}\n{end}",
        document,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(
            f"the document must have one block between {begin} and {end}, has {count}."
        )
    return document


def write_block(path: Path, name: str, text: str) -> None:
    """`with_block`, of the document at `path`."""
    try:
        renewed = with_block(path.read_text(encoding="utf-8"), name, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    path.write_text(renewed, encoding="utf-8")
