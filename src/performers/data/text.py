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
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int32
from torch import Tensor

from performers.data.vocabulary import TOKENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "encode_text",
    "log_likelihood_multiplier",
    "paragraphs",
    "piece_ids",
    "sentences",
    "train_vocabulary",
]

SPECIAL_TOKENS = (*TOKENS[:4], "<unk>")  # <pad>, <bos>, <eos>, <mask>
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))  # as SentencePiece names them
# What the names of special tokens and bytes are written with, for texts that have such a word.
ALPHABET = sorted(set("".join((*SPECIAL_TOKENS, *BYTES))))


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


def train_vocabulary(texts: Iterable[str], size: int, *, is_invertible: bool = False) -> Tokenizer:
    """A unigram SentencePiece vocabulary (Kudo & Richardson 2018) of at most `size` tokens.

    Spaces are part of the pieces, so decoding gives the text back, except for characters that
    `texts` do not contain, which become <unk>, and a space at the beginning.

    is_invertible: decoding gives back every text whatever. Each line break is a piece, and what
        `texts` do not contain is written as bytes, which take 256 of the tokens. This is how the
        paper prepares PG-19 (Appendix A.1.1), whole books at a time.

    Raises ValueError if `size` leaves no room for pieces.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    taken = len(SPECIAL_TOKENS) + (len(BYTES) if is_invertible else 0)
    if size <= taken:
        raise ValueError(
            f"size must leave room for pieces beside the {len(SPECIAL_TOKENS)} special tokens"
            f"{' and 256 bytes' if is_invertible else ''}, got {size}. The paper's is 32768."
        )
    tokenizer = Tokenizer(models.Unigram())
    if is_invertible:
        words = Regex(r" ?\S+|\s")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="isolated")
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=size - taken + len(SPECIAL_TOKENS),
            special_tokens=list(SPECIAL_TOKENS),
            unk_token=SPECIAL_TOKENS[-1],
            initial_alphabet=ALPHABET if is_invertible else [],
            show_progress=False,
        ),
    )
    return _canonical(tokenizer, is_invertible)


def _canonical(tokenizer: Tokenizer, has_bytes: bool) -> Tokenizer:
    """The same pieces in an order that the texts alone decide, after bytes where it has them.

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
    # Bytes stand for what no piece can write. A text that reads "<0x41>" or "<pad>" is neither a
    # byte nor the end of a row: written in pieces it is cheaper.
    dear = [(name, 100 * lowest) for name in (*SPECIAL_TOKENS, *BYTES)]
    tokenizer.encode_special_tokens = has_bytes
    tokenizer.model = models.Unigram(
        [*(dear if has_bytes else map(tuple, special)), *rounded],
        unk_id=SPECIAL_TOKENS.index("<unk>"),
        byte_fallback=has_bytes,
    )
    return tokenizer


def piece_ids(tokenizer: Tokenizer) -> range:
    """The ids of the pieces, bytes among them. These are masked and scored, no special tokens."""
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
