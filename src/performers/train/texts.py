"""Text that a model is trained on: tokens of a tokenizer, and sets held out.

file ──read_texts──► a running text, or records
     ──the tokenizer of a pretrained model, or bytes──► windows of length tokens, or of a
     record at most so many
     ──► train │ valid │ test        the end of a running text; records are shuffled first
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from performers.convert.sequences import Sequences
from performers.data.files import Record, read_texts
from performers.data.masking import CausalCollator, Collator, MaskedCollator
from performers.data.tokens import TokenDataset
from performers.train.data import DataConfig
from performers.train.tasks import TASKS, HiddenTokens, Task

__all__ = ["Texts", "as_sequences", "read_held_out", "task_of_text"]


@dataclass(frozen=True, eq=False)
class Texts:
    """What is trained on and held out; `ood` is empty, because texts have no families."""

    train: TokenDataset
    valid: TokenDataset
    test: TokenDataset
    ood: TokenDataset

    def summary(self) -> dict[str, int]:
        """Counts for a report."""
        counts: dict[str, int] = {}
        for name in ("train", "valid", "test"):
            split: TokenDataset = getattr(self, name)
            counts |= {f"{name}_sequences": len(split), f"{name}_tokens": len(split.tokens)}
        return counts

    def description(self, source: str | Sequence[str]) -> str:
        """What the sets are made of, in words."""
        counts = self.summary()
        return (
            f"{source}: {counts['train_sequences']:,} sequences with {counts['train_tokens']:,} "
            "tokens to train on"
        )


def read_held_out(config: DataConfig, tokenizer: Any, vocab_size: int, seed: int) -> Texts:
    """The text of `data.text`, cut into sequences and split: the end is for the test, and what
    comes before it for validation. Records are shuffled first, for they may be sorted.

    `vocab_size`: of the model.

    Raises what `as_sequences` raises, and ValueError for a text that is too short to split.
    """
    assert config.text is not None, "the config has been checked"
    texts = read_texts(config.text, config.text_format, config.columns)
    rows = as_sequences(texts, config.text, tokenizer, config.length, vocab_size)
    order = torch.arange(len(rows))
    if not isinstance(texts, str):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    valid, test = (
        max(1, int(share * len(rows))) if share else 0
        for share in (config.valid_fraction, config.test_fraction)
    )
    train = len(rows) - valid - test
    if train < 1:
        raise ValueError(
            f"data.text must have a sequence to train on beside {valid} for validation and {test} "
            f"for the test, of at most {config.length} tokens each: {config.text} has {len(rows)}. "
            "Give more text, or a smaller data.length."
        )
    sets = order.tolist()
    return Texts(
        train=rows.chosen(sets[:train]),
        valid=rows.chosen(sets[train : train + valid]),
        test=rows.chosen(sets[train + valid :]),
        ood=rows.chosen([]),
    )


def as_sequences(
    texts: str | list[Record], name: str, tokenizer: Any, length: int, vocab_size: int
) -> TokenDataset:
    """A running text in windows of `length` tokens, or the first `length` of each record.

    Raises ValueError for pairs.
    """
    if not isinstance(texts, str) and len(texts[0]) > 1:
        raise ValueError(
            f"a sequence is one text here, and records of {name} are pairs. Choose one column."
        )
    found = Sequences.of(tokenizer, texts, length)
    lengths = found.lengths
    ids = found.inputs["input_ids"]
    is_real = torch.arange(ids.shape[1]) < lengths[:, None]  # records are padded on the right
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return TokenDataset(ids[is_real].int(), starts, vocab_size)


def task_of_text(name: str, tokenizer: Any) -> Task:
    """The task of this name on tokens of a tokenizer: special ones are neither hidden nor drawn.

    Raises ValueError for a masked model whose tokenizer has no token for what is hidden.
    """
    # Of models that have no token for padding any will do, because nothing sees it.
    padding = tokenizer.pad_token_id or 0
    if name == "causal-lm":

        def causal(seed: int) -> Collator:
            return CausalCollator(token_ids=range(len(tokenizer)), pad_token_id=padding)

        return replace(TASKS[name], collator=causal, evaluation_collator=causal)
    hidden = tokenizer.mask_token_id
    if hidden is None:
        raise ValueError(
            "task: masked-lm hides tokens, and the tokenizer of the model has no mask_token. Save "
            "the tokenizer that the model was trained with in its folder."
        )
    special = set(tokenizer.all_special_ids)
    words = tuple(token for token in range(len(tokenizer)) if token not in special)

    def masked(seed: int) -> Collator:
        return MaskedCollator(seed, token_ids=words, pad_token_id=padding, mask_token_id=hidden)

    def evaluated(seed: int) -> Collator:
        return HiddenTokens(seed, token_ids=words, pad_token_id=padding, mask_token_id=hidden)

    return replace(TASKS[name], collator=masked, evaluation_collator=evaluated)
