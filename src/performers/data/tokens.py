"""Sequences of token ids, as a data set that the Trainer and its workers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64, Integer
from torch import Tensor
from torch.utils.data import Dataset

from performers.checks import check_count
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID

__all__ = ["TokenDataset", "concatenate_tokens", "crop_tokens", "frame_tokens"]


@dataclass(frozen=True, eq=False)
class TokenDataset(Dataset[dict[str, Tensor]]):
    """Sequences of token ids; item i is `{"input_ids": Int64[Tensor, " length"]}`.

    They are stored end to end in one tensor, with a byte per token for proteins: 165 million
    residues take 165 MB.
    """

    tokens: Integer[Tensor, " tokens"]
    starts: Int64[Tensor, " sequences_plus_one"]
    vocab_size: int

    def __len__(self) -> int:
        return self.starts.shape[0] - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"the dataset has {count} sequences, got index {index}.")
        place = index % count
        start, end = self.starts[place : place + 2].tolist()
        return {"input_ids": self.tokens[start:end].long()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, special tokens included."""
        return self.starts.diff().tolist()

    def chosen(self, indices: Sequence[int]) -> TokenDataset:
        """The sequences of these indices, in this order."""
        ends = self.starts.diff()[list(indices)].cumsum(0)
        rows = [self.tokens[self.starts[index] : self.starts[index + 1]] for index in indices]
        return replace(self, tokens=_join(rows), starts=torch.cat([ends.new_zeros(1), ends]))

    def token_counts(self) -> Int64[Tensor, " vocabulary"]:
        """How often each token id occurs."""
        return torch.bincount(self.tokens, minlength=self.vocab_size)


def frame_tokens(row: Integer[Tensor, " length"]) -> Integer[Tensor, " length_plus_two"]:
    """`<bos> row <eos>`."""
    return torch.cat([row.new_tensor([BOS_TOKEN_ID]), row, row.new_tensor([EOS_TOKEN_ID])])


def crop_tokens(rows: Sequence[Tensor], length: int, vocab_size: int) -> TokenDataset:
    """`<bos> row <eos>`, of which the first `length` tokens stay; one that is cut has no <eos>."""
    check_count("length", length)
    framed = [frame_tokens(row)[:length] for row in rows]
    ends = torch.tensor([0] + [len(row) for row in framed]).cumsum(0)
    return TokenDataset(_join(framed), ends, vocab_size)


def concatenate_tokens(rows: Sequence[Tensor], length: int, vocab_size: int) -> TokenDataset:
    """All rows end to end, each followed by <eos>, in disjoint windows of `length` tokens.

    The tokens after the last whole window are left out, so that every sequence has the same length.

    Raises ValueError when the rows do not fill one window.
    """
    check_count("length", length)
    chain = _join([torch.cat([row, row.new_tensor([EOS_TOKEN_ID])]) for row in rows])
    num_windows = len(chain) // length
    if rows and not num_windows:
        raise ValueError(
            f"what is concatenated must fill one window of length {length}: {len(rows)} sequences "
            f"have {len(chain)} tokens. Give more sequences, a larger fraction, or a smaller "
            "length."
        )
    windows = torch.arange(num_windows + 1) * length
    return TokenDataset(chain[: num_windows * length], windows, vocab_size)


def _join(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8)
