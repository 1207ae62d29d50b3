"""Tokens that a model reads: windows of a running text, or records side by side with padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from performers.data.files import Record

__all__ = ["Sequences", "text_windows"]


@dataclass(frozen=True)
class Sequences:
    """Arguments of a model by their names, each (sequences, length).

    Records have an `attention_mask` and are padded on the right; windows of a text are not padded.
    """

    inputs: dict[str, Tensor]

    @classmethod
    def of(
        cls, tokenizer: Any, texts: str | Sequence[Record], length: int, has_types: bool = False
    ) -> Sequences:
        """A text as windows of exactly `length` tokens; records as they are, the first `length`
        tokens of each, special tokens included.

        `has_types`: the model tells the first text of a pair from the second by their token types.

        Raises ValueError for a text that is shorter.
        """
        if isinstance(texts, str):
            return cls({"input_ids": text_windows(tokenizer, texts, length)})
        first, *second = (list(column) for column in zip(*texts, strict=True))
        has_types = has_types and bool(second)
        found = tokenizer(
            first, *second, truncation=True, max_length=length, return_token_type_ids=has_types
        )
        names = ["input_ids", *(["token_type_ids"] if has_types else [])]
        rows = {name: [torch.tensor(row) for row in found[name]] for name in names}
        rows["attention_mask"] = [torch.ones_like(row) for row in rows["input_ids"]]
        # Of models that have no token for padding any will do, because nothing sees it.
        padding = {"input_ids": tokenizer.pad_token_id or 0}
        return cls(
            {
                name: pad_sequence(of, batch_first=True, padding_value=padding.get(name, 0))
                for name, of in rows.items()
            }
        )

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def __getitem__(self, index: slice | Int[Tensor, " count"]) -> Sequences:
        return Sequences({name: x[index] for name, x in self.inputs.items()})

    @property
    def lengths(self) -> Int[Tensor, " sequences"]:
        """The number of real tokens of each."""
        mask = self.inputs.get("attention_mask")
        ids = self.inputs["input_ids"]
        return torch.full((len(ids),), ids.shape[1]) if mask is None else mask.sum(dim=1)

    def batches(self, size: int, device: torch.device | None = None) -> list[dict[str, Tensor]]:
        """In order, each without columns that are padding alone."""
        return [
            {name: x[:, : int(part.lengths.max())].to(device) for name, x in part.inputs.items()}
            for part in (self[start : start + size] for start in range(0, len(self), size))
        ]

    def longest(self, count: int) -> Int[Tensor, "count length"]:
        """The `count` longest, as long as the shortest of these: tokens without padding."""
        order = self.lengths.argsort(descending=True, stable=True)[:count]
        return self.inputs["input_ids"][order, : int(self.lengths[order].min())]


def text_windows(tokenizer: Any, text: str, length: int) -> Int[Tensor, "windows length"]:
    """A text cut into windows of exactly `length` tokens, special tokens included.

    Raises ValueError for a text that is shorter.
    """
    if tokenizer.is_fast:
        found = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
        pieces = found["input_ids"]
    else:  # one that is written in Python gives no pieces
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        room = max(1, length - tokenizer.num_special_tokens_to_add())
        starts = range(0, max(1, len(tokens)), room)
        pieces = [
            tokenizer.build_inputs_with_special_tokens(tokens[start : start + room])
            for start in starts
        ]
    whole = [piece for piece in pieces if len(piece) == length]
    if not whole:
        raise ValueError(
            f"the text must have at least {length} tokens, got {len(pieces[0])}: "
            "give a longer text or a smaller length."
        )
    return torch.tensor(whole)
