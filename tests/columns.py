"""Printed tables taken apart, so that a test can say which number stands under which heading."""

import re


def columns(table: str) -> list[list[str]]:
    """The cells of each line; at least two spaces stand between columns."""
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


def by_heading(table: str) -> list[dict[str, str]]:
    """Each row by the headings of the first line, which are all different."""
    header, *rows = columns(table)
    assert len(set(header)) == len(header), header
    return [dict(zip(header, row, strict=True)) for row in rows]
