"""Tables of text: for a terminal, and for a document."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned", "markdown_table"]


def aligned(rows: Sequence[Sequence[str]], right: bool = True) -> list[str]:
    """One line per row, in aligned columns; if `right`, all but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def markdown_table(rows: Sequence[Sequence[str]], of_words: bool = False) -> str:
    """A table of Markdown, the first row its header; all columns but the first are set right,
    unless they are `of_words`.
    """
    header, *body = rows
    rule = "---" if of_words else "---:"
    lines = [header, ["---", *[rule] * (len(header) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
