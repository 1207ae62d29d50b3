"""The files of Long Range Arena as its authors publish them, and those that it takes from others.

    lra_release/listops-1000/basic_train.tsv                     read_list_operations
    lra_release/tsv_data/new_aan_pairs.train.tsv                 read_document_pairs
    lra_release/pathfinder32/curv_contour_length_14/             read_pathfinder
    aclImdb/train/                                               read_reviews
    cifar-10-batches-bin/data_batch_1.bin                        read_cifar

Source: Tay et al. 2021, "Long Range Arena: A Benchmark for Efficient Transformers".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from performers.data.labeled import LabeledSequences, byte_rows
from performers.data.list_operations import SYMBOLS, encode_expressions
from performers.records.files import read_text

__all__ = [
    "read_cifar",
    "read_document_pairs",
    "read_list_operations",
    "read_pathfinder",
    "read_reviews",
]

# Of red, green and blue in a gray pixel (ITU-R BT.601).
LUMA = np.array([0.2989, 0.5870, 0.1140])
CIFAR_PIXELS = 32 * 32


def read_list_operations(path: str | Path, length: int) -> LabeledSequences:
    """Expressions and their values: a header, then Source and Target of each line.

    The parentheses of the published form repeat its brackets and are left out.
    """
    expressions, values = [], []
    for source, target in _lines(Path(path), columns=2, header=True):
        symbols = [symbol for symbol in source.split() if symbol not in "()"]
        unknown = set(symbols) - set(SYMBOLS)
        if unknown:
            raise ValueError(
                f"{path} must have expressions of {' '.join(SYMBOLS)}, got {unknown.pop()!r}."
            )
        expressions.append(symbols)
        values.append(int(target))
    return encode_expressions(expressions, values, length)


def read_document_pairs(path: str | Path, length: int) -> LabeledSequences:
    """Pairs of papers and whether one cites the other: label, two names and two texts a line."""
    lines = list(_lines(Path(path), columns=5))
    firsts, seconds = ([line[column].encode() for line in lines] for column in (3, 4))
    return LabeledSequences(
        torch.stack([byte_rows(firsts, length), byte_rows(seconds, length)], dim=1),
        torch.tensor([int(float(line[0])) for line in lines]),
    )


def read_reviews(folder: str | Path, length: int) -> LabeledSequences:
    """Reviews of films, the files of neg/ and pos/: the label is 1 for praise."""
    kinds = [sorted(Path(folder, kind).glob("*.txt")) for kind in ("neg", "pos")]
    if not all(kinds):
        raise FileNotFoundError(f"{folder} must have texts in neg/ and in pos/. Unpack aclImdb.")
    rows = [path.read_bytes() for paths in kinds for path in paths]
    labels = torch.arange(2).repeat_interleave(torch.tensor([len(paths) for paths in kinds]))
    return LabeledSequences(byte_rows(rows, length), labels)


def read_cifar(paths: Sequence[str | Path]) -> LabeledSequences:
    """Gray images of CIFAR-10, 32 × 32, from its binary form: a label, then red, green, blue."""
    content = b"".join(Path(path).read_bytes() for path in paths)
    if not content or len(content) % (1 + 3 * CIFAR_PIXELS):
        raise ValueError(
            f"files of CIFAR-10 must have {1 + 3 * CIFAR_PIXELS} bytes an image, got "
            f"{len(content)} in {len(paths)} files. Take its binary version."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * CIFAR_PIXELS)
    colors = records[:, 1:].reshape(-1, 3, CIFAR_PIXELS)
    gray = np.einsum("c,ncp->np", LUMA, colors).astype(np.uint8)
    return LabeledSequences(torch.from_numpy(gray), torch.from_numpy(records[:, 0].astype(int)))


def read_pathfinder(folder: str | Path) -> LabeledSequences:
    """The images of one difficulty, in the order of metadata/, and whether the dots are connected.

    Images that are empty files, of which the release has some, are left out.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading images needs Pillow. Install it with: pip install 'performers[viz]'."
        ) from error
    folder = Path(folder)
    images, labels = [], []
    for listed in sorted(folder.glob("metadata/*.npy"), key=lambda path: int(path.stem)):
        # Text, whatever the name says: a folder, a file, a number and the label.
        for line in read_text(listed).splitlines():
            place, name, _, label, *_ = line.split()
            path = folder / place / name
            if path.stat().st_size:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("L")).reshape(-1))
                labels.append(int(label))
    if not images:
        raise FileNotFoundError(f"{folder} must have metadata/ and imgs/, and has no image.")
    return LabeledSequences(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _lines(path: Path, columns: int, header: bool = False) -> Iterator[list[str]]:
    """The columns of each line; a text may hold any character but tabs and line ends."""
    lines = read_text(path).split("\n")[header:]
    for number, line in enumerate(lines, 1 + header):
        if not line:
            continue
        cells = line.split("\t")
        if len(cells) != columns:
            raise ValueError(
                f"{path} must have {columns} columns, separated by tabs: line {number} has "
                f"{len(cells)}. Download the file again."
            )
        yield cells
