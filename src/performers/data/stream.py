"""Sequences of tokens from files that do not fit into memory.

    files ──cut──► pieces, shuffled ──read──► records, shuffled in a buffer ──encode──► tokens
          ──► <bos> M K V … L <eos>       at most length tokens, or
          ──► M K V … L <eos> M A …       windows of length tokens

The order is a function of the seed, the pass over the files and the pieces, and of nothing else. A
buffer is filled, shuffled and emptied before it is filled again, so that what lies in it follows
from where the piece is. A buffer that is always full mixes farther, and what it holds cannot be
found again without reading everything before.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import IterableDataset

from performers.checks import check_choice, check_count, check_seed
from performers.data.fasta import read_piece
from performers.data.files import FASTA, LINES, TEXT
from performers.data.pieces import Piece, cut_files, numbered_lines
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE, encode_legal

if TYPE_CHECKING:
    import datasets

__all__ = ["STREAMED", "TokenStream", "stream_tokens"]

# What a piece begins with at a line, so that it holds whole records.
STREAMED = {FASTA: b">", LINES: b"", TEXT: b""}

# Tokens of which a stream says how often each occurs.
_COUNTED = 10_000_000

Encode = Callable[[str], Iterable[int]]
Item = TypeVar("Item", bound=Sized)


def stream_tokens(
    paths: str | Path | Sequence[str | Path],
    length: int,
    *,
    concatenate: bool = False,
    kind: str = FASTA,
    encode: Encode = encode_legal,
    shuffle_buffer: int = 10_000_000,
    seed: int = 0,
    epoch: int = 0,
    left_out: Collection[str] = (),
    piece_bytes: int = 64 << 20,
) -> datasets.IterableDataset:
    """One pass over files, read as they are asked for: a data set of the library `datasets`.

    Its items are `{"input_ids": Int64[Tensor, " length"], "epoch": Int64[Tensor, ""]}`. Its shards
    are pieces of plain files and whole gzipped ones, so that workers of a DataLoader and
    `datasets.distributed.split_dataset_by_node` divide them. `state_dict` and `load_state_dict` go
    on at the exact item, for which the piece is read from its beginning.

    length, concatenate: one record a sequence, `<bos> record <eos>`, of which `length` tokens stay;
        or records end to end, each followed by <eos>, in windows of `length`. Every piece begins a
        window, and the tokens after its last whole one are left out.
    kind: `"fasta"`, `"lines"` for a record a line, or `"text"`: a running text, in windows that
        follow each other, without <eos>, and are shuffled themselves.
    encode: from the text of a record, or of a line of a running text with its end, to its tokens.
    shuffle_buffer: letters, or tokens of windows, that are shuffled together; 0 keeps the order of
        the files.
    seed, epoch: another order for each of them.
    left_out: records that are passed over, such as those of a held-out set.

    Raises ValueError for options that do not fit and files that cannot be read twice, OSError for
    those that are not there; while it is read, what `read_fasta` raises for a defect; and
    ModuleNotFoundError without the package datasets.
    """
    check_choice("kind", kind, STREAMED)
    check_count("length", length)
    check_count("shuffle_buffer", shuffle_buffer, least=0)
    check_count("piece_bytes", piece_bytes)
    check_seed(seed)
    try:
        from datasets import IterableDataset as Streamed
        from datasets.iterable_dataset import ExamplesIterable
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "streaming files needs datasets. Install it with: pip install 'performers[hf]'."
        ) from error
    if kind == TEXT and not concatenate:
        raise ValueError(
            "a running text has no records to crop: pass concatenate=True, or kind='lines' where "
            "each line is a text by itself."
        )
    paths = [paths] if isinstance(paths, str | Path) else paths
    pieces = cut_files(paths, STREAMED[kind], piece_bytes)
    reader = _Reader(
        length, concatenate, kind, encode, shuffle_buffer, f"{seed} {epoch}", frozenset(left_out)
    )
    if shuffle_buffer:
        random.Random(reader.draw).shuffle(pieces)
    # Its `from_generator` does the same, but names each by a hash of `encode` and leaves a file of
    # this name in its cache.
    return Streamed(ExamplesIterable(_items, {"pieces": pieces, "reader": reader, "epoch": epoch}))


class TokenStream(IterableDataset[dict[str, Tensor]]):
    """Pass after pass over files, without an end, each in another order.

    Every process of a run reads all, and the Trainer gives it the sequences that are its own: so
    steps are the same on any number of processes. Workers of a DataLoader divide the pieces.

    `options`: those of `stream_tokens`.
    """

    def __init__(
        self, paths: Sequence[str | Path], length: int, vocab_size: int = VOCAB_SIZE, **options: Any
    ) -> None:
        self.paths, self.length, self.vocab_size = list(paths), length, vocab_size
        self.options = options
        self.num_pieces = self.one_pass(0).num_shards

    def one_pass(self, epoch: int) -> datasets.IterableDataset:
        return stream_tokens(self.paths, self.length, epoch=epoch, **self.options)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for epoch in itertools.count():
            is_empty = True
            for item in self.one_pass(epoch):
                is_empty = False
                yield item
            if is_empty:
                raise ValueError(
                    f"a stream must have a sequence: {', '.join(map(str, self.paths))} fill no "
                    f"window of length {self.length}, or hold nothing that is not held out. Give "
                    "more, or a smaller length."
                )

    def token_counts(self) -> Int64[Tensor, " vocabulary"]:
        """How often each token id occurs, in the first ten million tokens or a little more."""
        counts = torch.zeros(self.vocab_size, dtype=torch.int64)
        for item in self.one_pass(0):
            counts += torch.bincount(item["input_ids"], minlength=self.vocab_size)
            if counts.sum() >= _COUNTED:
                break
        return counts


@dataclass(frozen=True)
class _Reader:
    """How pieces become sequences. `draw`: what the random order is a function of."""

    length: int
    concatenate: bool
    kind: str
    encode: Encode
    shuffle_buffer: int
    draw: str
    left_out: frozenset[str]

    def sequences(self, piece: Piece) -> Iterator[array[int]]:
        generator = random.Random(f"{self.draw} {piece.number}")
        if self.kind == TEXT:
            lines = (self.encode(line) for _, line in numbered_lines(piece))
            yield from _shuffled(_windows(lines, self.length), self.shuffle_buffer, generator)
            return
        records = (text for text in self.records(piece) if text not in self.left_out)
        rows = map(self.encode, _shuffled(records, self.shuffle_buffer, generator))
        ended = (array("i", [*row, EOS_TOKEN_ID]) for row in rows)
        if self.concatenate:
            yield from _windows(ended, self.length)
        else:
            begin = array("i", [BOS_TOKEN_ID])
            yield from ((begin + row)[: self.length] for row in ended)

    def records(self, piece: Piece) -> Iterator[str]:
        if self.kind == FASTA:
            yield from (record.sequence for record in read_piece(piece))
        else:
            yield from (line.strip() for _, line in numbered_lines(piece) if line.strip())


def _items(
    pieces: list[Piece], reader: _Reader, epoch: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What `datasets` asks for: keys and items."""
    of_pass = torch.tensor(epoch)
    for piece in pieces:
        for key, sequence in enumerate(reader.sequences(piece)):
            ids = torch.frombuffer(sequence, dtype=torch.int32).long()
            yield key, {"input_ids": ids, "epoch": of_pass}


def _shuffled(items: Iterable[Item], size: int, generator: random.Random) -> Iterator[Item]:
    """The items, of which `size` letters or tokens after `size` are shuffled."""
    held: list[Item] = []
    left = size
    for item in items:
        held.append(item)
        left -= len(item)
        if left <= 0:
            generator.shuffle(held)
            yield from held
            held, left = [], size
    generator.shuffle(held)
    yield from held


def _windows(rows: Iterable[Iterable[int]], length: int) -> Iterator[array[int]]:
    """The rows end to end in disjoint windows; what is left behind the last whole one is not."""
    held = array("i")
    for row in rows:
        held.extend(row)
        whole = len(held) - len(held) % length
        yield from (held[start : start + length] for start in range(0, whole, length))
        del held[:whole]
