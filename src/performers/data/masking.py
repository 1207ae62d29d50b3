"""What is scored: 15 % of the amino acids (bidirectional) or every next token (unidirectional).

The collators turn items of a `TokenDataset` into the batch a transformers model takes: `input_ids`,
`attention_mask` (1 = real) and `labels` (−100 = not scored), each int64 (batch, length), padded on
the right.

Which positions are masked is a function of (seed, epoch, the tokens of the row) and of nothing
else: not of the batch, the neighboring rows, the worker, the rank or the number of steps before.
Therefore a resumed run masks exactly as an uninterrupted run, and two models are evaluated on the
same positions.

Source: Choromanski et al. 2021, Appendix A.1 and C; Devlin et al. 2019, Section 3.1 (15 %,
80/10/10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from performers.data.vocabulary import AMINO_ACID_IDS, EOS_TOKEN_ID, MASK_TOKEN_ID, PAD_TOKEN_ID

__all__ = ["NOT_SCORED", "CausalCollator", "Collator", "MaskedCollator", "mask_tokens", "pad"]

NOT_SCORED = -100

Batch = dict[str, Tensor]


@dataclass
class MaskedCollator:
    """Batches for masked language modeling: `labels` are the tokens that `mask_tokens` chose.

    `set_epoch` makes each epoch mask other positions. Call it when an epoch starts, with the number
    of epochs done; an evaluation leaves it at 0 and so always scores the same positions. DataLoader
    workers hold a copy, so it takes effect when they start (not with `persistent_workers=True`).
    Items of a stream say themselves which pass they are of, their `epoch`, which is added.
    `token_ids`: what is masked and scored; amino acids by default, and the other ids are those of
    their vocabulary.
    """

    seed: int = 0
    mask_rate: float = 0.15
    pad_to_multiple_of: int = 1
    epoch: int = 0
    token_ids: Sequence[int] = AMINO_ACID_IDS
    pad_token_id: int = PAD_TOKEN_ID
    mask_token_id: int = MASK_TOKEN_ID

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise ValueError(
                f"mask_rate must be between 0 and 1, got {self.mask_rate}. BERT's is 0.15."
            )

    @property
    def scored_token_ids(self) -> tuple[int, ...]:
        """The tokens that a label can be, never special tokens."""
        return tuple(self.token_ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, items: Sequence[Batch]) -> Batch:
        input_ids, attention_mask = pad(items, self.pad_to_multiple_of, self.pad_token_id)
        epochs = self.epoch + torch.tensor([int(item.get("epoch", 0)) for item in items])
        masked_ids, labels = mask_tokens(
            input_ids,
            self.seed,
            epochs,
            self.mask_rate,
            self.token_ids,
            pad_token_id=self.pad_token_id,
            mask_token_id=self.mask_token_id,
        )
        return {"input_ids": masked_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class CausalCollator:
    """Batches for next-token prediction: `labels` are the real tokens, unshifted.

    Models shift the labels themselves, as transformers' do: position i is scored on token i + 1.
    The first token of a row has nothing before it and never counts. `token_ids`: what else can be a
    label; by default each amino acid and the end of a sequence.
    """

    pad_to_multiple_of: int = 1
    token_ids: Sequence[int] = (EOS_TOKEN_ID, *AMINO_ACID_IDS)
    pad_token_id: int = PAD_TOKEN_ID

    @property
    def scored_token_ids(self) -> tuple[int, ...]:
        """The tokens that a label can be."""
        return tuple(self.token_ids)

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: this collator draws nothing at random, so all epochs are the same."""

    def __call__(self, items: Sequence[Batch]) -> Batch:
        input_ids, attention_mask = pad(items, self.pad_to_multiple_of, self.pad_token_id)
        labels = input_ids.masked_fill(attention_mask == 0, NOT_SCORED)
        labels[:, 0] = NOT_SCORED
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# A collator turns items of a dataset into a batch, and knows which tokens it scores.
Collator = MaskedCollator | CausalCollator


def pad(
    items: Sequence[Batch], multiple_of: int = 1, pad_token_id: int = PAD_TOKEN_ID
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """`input_ids` and `attention_mask` of items of unequal length, padded on the right.

    `multiple_of` rounds the length up, which keeps the number of shapes small for a compiled model.
    """
    rows = [item["input_ids"] for item in items]
    length = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)  # a text may have the id of padding, too
    for padded, mask, row in zip(input_ids, attention_mask, rows, strict=True):
        padded[: len(row)], mask[: len(row)] = row, 1
    return input_ids, attention_mask


def mask_tokens(
    input_ids: Int64[Tensor, "batch length"],
    seed: int,
    epoch: int | Int64[Tensor, " batch"] = 0,
    mask_rate: float = 0.15,
    token_ids: Sequence[int] = AMINO_ACID_IDS,
    *,
    pad_token_id: int = PAD_TOKEN_ID,
    mask_token_id: int = MASK_TOKEN_ID,
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """BERT's masking, a function of (seed, epoch, the row's tokens): masked input ids and labels.

    `epoch`: of all rows, or of each.

    Each token of `token_ids` is chosen with probability `mask_rate`, independently. A chosen one
    becomes `mask_token_id` (80 %), a random one of `token_ids` (10 %) or stays (10 %); its label is
    what it was. Other tokens are never chosen. Every row that has any of these has at least one
    label, if need be the position that came nearest to being chosen, so that every batch has a
    loss.

    Source: Devlin et al. 2019, Section 3.1.
    """
    bits = _random_bits(input_ids, seed, epoch, pad_token_id)
    choice, action, substitute = _uniform(bits), _uniform(_mix(bits)), _mix(_mix(bits))

    candidates = torch.tensor(token_ids, device=input_ids.device)
    may_be_chosen = torch.isin(input_ids, candidates)
    choice = choice.masked_fill(~may_be_chosen, torch.inf)
    # The smallest number of a row is always chosen: a row has at least one label.
    chosen = may_be_chosen & ((choice < mask_rate) | (choice == choice.amin(dim=1, keepdim=True)))

    masked_ids = input_ids.masked_fill(chosen & (action < 0.8), mask_token_id)
    random_ids = candidates[substitute.remainder(len(candidates))]
    masked_ids = torch.where(chosen & (action >= 0.9), random_ids, masked_ids)
    return masked_ids, input_ids.masked_fill(~chosen, NOT_SCORED)


# A torch.Generator for each row would need a Python loop over rows. A counter-based generator has
# no state: the bits of position i are a hash of (row key, i), computed for all rows at once. The
# hash is SplitMix64 (Steele, Lea and Flood 2014), whose 64-bit arithmetic wraps around exactly as
# torch's int64 does.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64


def _random_bits(
    input_ids: Int64[Tensor, "batch length"],
    seed: int,
    epoch: int | Int64[Tensor, " batch"],
    pad_token_id: int,
) -> Int64[Tensor, "batch length"]:
    position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device) * _GOLDEN_GAMMA
    is_real = input_ids != pad_token_id
    # A sum over real tokens, so that the amount of padding does not change the key of a row.
    content = (_mix(position + input_ids) * is_real).sum(dim=1, keepdim=True)
    epochs = torch.as_tensor(epoch, device=input_ids.device).reshape(-1, 1)
    row_key = _mix(content + _mix(_as_int64(seed) + _mix(epochs)))
    return _mix(row_key + position)


def _mix(bits: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """The output function of SplitMix64: each bit of the input flips half the bits."""
    bits = (bits ^ _shift_right(bits, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ _shift_right(bits, 27)) * (0x94D049BB133111EB - 2**64)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Int64[Tensor, "*shape"], by: int) -> Int64[Tensor, "*shape"]:
    """The shift of unsigned integers. torch's own shift copies the sign bit."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _uniform(bits: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """The upper 53 bits as a number in [0, 1)."""
    return _shift_right(bits, 11).double() * 2.0**-53


def _as_int64(number: int) -> int:
    # Python's integers have no bound; this wraps one around as int64 does.
    return (number + 2**63) % 2**64 - 2**63
