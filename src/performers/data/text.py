"""Books: sentences, a vocabulary trained on them, and the multiplier of its perplexities.

    book ──paragraphs──► unwrapped lines ──sentences──► "It is a truth universally acknowledged, …"
         ──train_vocabulary──► unigram SentencePiece pieces ──encode_text──► token ids

Special tokens have the same ids as for proteins, and pieces come after them. So `crop_tokens`,
`concatenate_tokens`, masking and the empirical baseline work for text as well.

Source: Choromanski et al. 2021, Appendix A.1.1.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int32
from torch import Tensor

from performers.data.fetch import DebianPackage
from performers.data.vocabulary import TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "AUSTEN",
    "encode_text",
    "log_likelihood_multiplier",
    "paragraphs",
    "piece_ids",
    "sentences",
    "train_vocabulary",
]

SPECIAL_TOKENS = (*TOKENS[:4], "<unk>")  # <pad>, <bos>, <eos>, <mask>


def paragraphs(book: str) -> list[str]:
    """The paragraphs of a text with hard line breaks, each on one line with single spaces.

    >>> paragraphs("CHAPTER I\\n\\n\\nEmma Woodhouse, handsome,\\nclever, and rich")
    ['CHAPTER I', 'Emma Woodhouse, handsome, clever, and rich']
    """
    return [" ".join(text.split()) for text in re.split(r"\n\s*\n", book) if text.strip()]


def sentences(book: str) -> list[str]:
    """The sentences of a book, in order. A sentence ends at the latest where its paragraph ends.

    >>> sentences('"Indeed!" said Mr. Weston. "Is he?"')
    ['"Indeed!" said Mr. Weston.', '"Is he?"']
    """
    found = []
    for paragraph in paragraphs(book):
        start = 0
        for end in re.finditer(r"[.!?][\"')_]*(?= [\"'(_]*[A-Z])", paragraph):
            if not re.search(r"\b(?:Mr|Mrs|Dr|St|Esq)\.$", paragraph[start : end.end()]):
                found.append(paragraph[start : end.end()].strip())
                start = end.end()
        found.append(paragraph[start:].strip())
    return found


def train_vocabulary(texts: Iterable[str], size: int) -> Tokenizer:
    """A unigram SentencePiece vocabulary (Kudo & Richardson 2018) of at most `size` tokens.

    Spaces are part of the pieces, so decoding gives the text back, except for characters that
    `texts` do not contain, which become <unk>.

    Raises ValueError if `size` leaves no room for pieces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size <= len(SPECIAL_TOKENS):
        raise ValueError(
            f"size must leave room for pieces beside the {len(SPECIAL_TOKENS)} special tokens, got "
            f"{size}. The paper's is 32768."
        )
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL_TOKENS),
            unk_token=SPECIAL_TOKENS[-1],
            show_progress=False,
        ),
    )
    return _canonical(tokenizer)


def _canonical(tokenizer: Tokenizer) -> Tokenizer:
    """The same pieces in an order that the texts alone decide.

    The trainer hashes with a random seed: which of the characters that it must keep comes first,
    0.0001 apart in score from the lowest upwards, changes from run to run.
    """
    from tokenizers import models

    scores = json.loads(tokenizer.to_str())["model"]["vocab"]
    special, pieces = scores[: len(SPECIAL_TOKENS)], scores[len(SPECIAL_TOKENS) :]
    lowest = min(score for _, score in pieces)
    kept = lowest + 0.0001 * sum(len(piece) == 1 for piece, _ in pieces)
    # These characters all get the lowest score, and the sort below orders equal scores by name.
    level = [(p, lowest if len(p) == 1 and score <= kept else score) for p, score in pieces]
    rounded = [(piece, round(score, 6)) for piece, score in level]
    rounded.sort(key=lambda entry: (-entry[1], entry[0]))
    unknown = SPECIAL_TOKENS.index("<unk>")
    tokenizer.model = models.Unigram([*map(tuple, special), *rounded], unk_id=unknown)
    return tokenizer


def piece_ids(tokenizer: Tokenizer) -> range:
    """The ids of the pieces. These are masked and scored; special tokens are not."""
    return range(len(SPECIAL_TOKENS), tokenizer.get_vocab_size())


def encode_text(texts: Sequence[str], tokenizer: Tokenizer) -> list[Int32[Tensor, " length"]]:
    """Token ids of each text, without <bos> and <eos>."""
    return [
        torch.tensor(encoding.ids, dtype=torch.int32)
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]


def log_likelihood_multiplier(texts: Sequence[str], tokenizer: Tokenizer) -> float:
    """Tokens per word: what a loss per token is multiplied by before exp gives a perplexity.

    perplexity = exp(multiplier · loss) is then one per word, whatever the vocabulary. The paper's
    values for PG-19 are 1.5634 (train), 1.5487 (valid) and 1.5359 (test).

    Source: Choromanski et al. 2021, Appendix A.1.1.
    """
    tokens = sum(map(len, encode_text(texts, tokenizer)))
    return tokens / sum(len(text.split()) for text in texts)


def _read_austen(folder: Path) -> dict[str, str]:
    """The novels of the R package janeaustenr, by their titles.

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


# The six novels of Jane Austen, 1811 to 1817, from Project Gutenberg: 4.0 million characters.
AUSTEN = DebianPackage(
    "r-cran-janeaustenr", "MIT (package). The novels are in the public domain.", _read_austen
)
