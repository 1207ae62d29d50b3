"""Resident memory while a run's data are read from a FASTA file of 2 GB, made of real proteins.

python benchmarks/streaming.py FOLDER    # some five minutes; writes streaming.json and docs/data.md

FOLDER takes the file, which is deleted in the end. It is the sample of the package, repeated until
there are 2 GB. What is read are windows of 8,192 tokens, shuffled ten million letters at a time, as
`data.stream` reads them for `performers train`.
"""

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

from performers.data.proteins import SAMPLE_PATH
from performers.data.stream import TokenStream
from performers.records import describe_environment, markdown_table, resident_bytes, write_block

RESULTS = Path(__file__).with_name("streaming.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "data.md"
BLOCK = "results:streaming"
SIZE = 2 * 10**9
LENGTH, BUFFER = 8192, 10_000_000
EVERY = 1000  # windows from one look at the memory to the next
# Columns of the table: shares of the file that have been read.
SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)


def make_file(path: Path, size: int) -> None:
    text = gzip.decompress(SAMPLE_PATH.read_bytes())
    with path.open("wb") as file:
        for _ in range(-(-size // len(text))):
            file.write(text)


def read(path: Path) -> dict[str, Any]:
    """Memory before the first window and every so many, and the time."""
    stream = TokenStream([path], LENGTH, concatenate=True, shuffle_buffer=BUFFER)
    resident = [resident_bytes()]
    windows, start = 0, time.process_time()
    for windows, _ in enumerate(stream.one_pass(0), 1):
        if windows % EVERY == 0:
            resident.append(resident_bytes())
    return {
        "file_bytes": path.stat().st_size,
        "windows": windows,
        "seconds": time.process_time() - start,
        "windows_per_look": EVERY,
        "resident_bytes": resident,
    }


def table(results: dict[str, Any]) -> str:
    """Memory by how much has been read, and how far it moved once a buffer had been full."""
    looks = results["resident_bytes"]
    # One buffer of letters is filled while another's windows are handed on.
    filled = looks[1 + 2 * BUFFER // (LENGTH * EVERY) :]
    gigabytes = results["file_bytes"] / 1e9
    at = [looks[round(share * (len(looks) - 1))] for share in SHARES]
    lines = [
        ["read so far", "nothing", *(f"{share * gigabytes:.1f} GB" for share in SHARES)],
        ["resident memory", *(f"{x / 1e6:.0f} MB" for x in (looks[0], *at))],
    ]
    environment = results["environment"]
    made = (
        f"{gigabytes:.1f} GB of FASTA, {results['windows']:,} windows of {LENGTH:,} tokens: once "
        f"the buffer was full, the memory of the process stayed within "
        f"{(max(filled) - min(filled)) / 1e6:.0f} MB. It took {results['seconds']:.0f} s of CPU "
        f"time, {results['file_bytes'] / results['seconds'] / 1e6:.1f} MB a second, on "
        f"{environment['processor']}, torch {environment['packages']['torch']}. Written by "
        "`python benchmarks/streaming.py`."
    )
    return f"{markdown_table(lines)}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, help="bytes")
    arguments = parser.parse_args()
    path = arguments.folder / "repeated.fasta"
    make_file(path, arguments.size)
    try:
        results = read(path) | {"environment": describe_environment()}
    finally:
        path.unlink()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(results))


if __name__ == "__main__":
    main()
