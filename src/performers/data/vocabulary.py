"""The amino-acid vocabulary: 25 letters and four special tokens.

The letters are the 20 standard amino acids and the 5 anomalous ones of UniProt: B (D or N), O
(pyrrolysine), U (selenocysteine), X (unknown), Z (E or Q). The rare IUPAC letter J (I or L), which
UniProt does not use, is read as X, so that the letters stay the paper's 25.

    id      0       1       2       3        4 … 23                24 … 28
    token   <pad>   <bos>   <eos>   <mask>   A C D … W Y           B O U X Z

Source: Choromanski et al. 2021, Appendix C.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Int64
from torch import Tensor

__all__ = [
    "AMINO_ACIDS",
    "AMINO_ACID_IDS",
    "ANOMALOUS_AMINO_ACIDS",
    "BOS_TOKEN_ID",
    "EOS_TOKEN_ID",
    "LEGAL_LETTERS",
    "MASK_TOKEN_ID",
    "PAD_TOKEN_ID",
    "STANDARD_AMINO_ACIDS",
    "TOKENS",
    "VOCAB_SIZE",
    "decode",
    "encode",
    "encode_legal",
]

STANDARD_AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
ANOMALOUS_AMINO_ACIDS = "BOUXZ"
AMINO_ACIDS = STANDARD_AMINO_ACIDS + ANOMALOUS_AMINO_ACIDS
LEGAL_LETTERS = AMINO_ACIDS + "J"

TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>", *AMINO_ACIDS)
PAD_TOKEN_ID, BOS_TOKEN_ID, EOS_TOKEN_ID, MASK_TOKEN_ID = range(4)
AMINO_ACID_IDS = range(4, len(TOKENS))
VOCAB_SIZE = len(TOKENS)


def _id_of_each_byte() -> Int64[Tensor, " 256"]:
    """The token id of each ASCII letter in either case; PAD_TOKEN_ID marks an illegal byte."""
    table = torch.full((256,), PAD_TOKEN_ID, dtype=torch.int64)
    for letter in LEGAL_LETTERS:
        token = TOKENS.index("X" if letter == "J" else letter)
        table[ord(letter)] = table[ord(letter.lower())] = token
    return table


_ID_OF_BYTE = _id_of_each_byte()
_TABLE = bytes(_ID_OF_BYTE.tolist())


def encode(sequence: str) -> Int64[Tensor, " length"]:
    """Token ids of the letters of a protein, in either case, without special tokens.

    Raises ValueError for a letter that is no amino acid.

    >>> encode("MKV")
    tensor([14, 12, 21])
    """
    if not sequence:
        return torch.empty(0, dtype=torch.int64)
    # One byte per character, so that an index into `ids` is an index into `sequence`.
    letters = bytearray(sequence, "ascii", errors="replace")
    ids = _ID_OF_BYTE[torch.frombuffer(letters, dtype=torch.uint8).long()]
    illegal = (ids == PAD_TOKEN_ID).nonzero()
    if len(illegal):
        position = int(illegal[0])
        raise ValueError(
            f"a protein is written with the letters {LEGAL_LETTERS}: got {sequence[position]!r} at "
            f"position {position + 1}. Remove it, or write X for an unknown amino acid."
        )
    return ids


def encode_legal(sequence: str) -> bytes:
    """The ids that `encode` gives, a byte each, of letters that are known to be legal.

    >>> list(encode_legal("MKV"))
    [14, 12, 21]
    """
    return sequence.encode("ascii").translate(_TABLE)


def decode(ids: Int64[Tensor, " length"], skip_special_tokens: bool = False) -> str:
    """The text of token ids; special tokens appear as `<mask>` and so on, or are left out.

    Raises ValueError for an id outside the vocabulary.

    >>> decode(torch.tensor([BOS_TOKEN_ID, 14, MASK_TOKEN_ID, 21, EOS_TOKEN_ID]))
    '<bos>M<mask>V<eos>'
    """
    tokens = ids.tolist()
    for token in tokens:
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"a token id must be in 0 … {VOCAB_SIZE - 1}, got {token}.")
    return "".join(
        TOKENS[token] for token in tokens if token in AMINO_ACID_IDS or not skip_special_tokens
    )
