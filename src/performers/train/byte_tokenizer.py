"""Text for a model of its own, which has no tokenizer yet: a token for each byte."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["byte_tokenizer"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of transformers with a token for each byte of UTF-8, for models of text that
    begin from nothing: every text has tokens, in every language, and comes back as it was.

    Beside the bytes there are one for padding, which is 0 as for proteins, and one for what is
    hidden. None begins or ends a text.
    """
    tokens = "<pad>", "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )
