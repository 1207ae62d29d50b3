"""Proteins: reading, vocabulary, splits without leaks, masking, and the baseline to beat.

from performers.data import MaskedCollator, load_proteins

splits = load_proteins("sample", length=1024)         # .train .valid .test .ood
batch = MaskedCollator(seed=0)([splits.train[i] for i in range(8)])
# input_ids, attention_mask, labels (−100 = not scored): int64 (batch, length)
"""

from performers.data.baseline import EmpiricalBaseline
from performers.data.fasta import FastaRecord, read_fasta
from performers.data.files import read_texts
from performers.data.masking import (
    NOT_SCORED,
    CausalCollator,
    Collator,
    MaskedCollator,
    mask_tokens,
)
from performers.data.proteins import (
    Protein,
    ProteinSplits,
    concatenate_sequences,
    crop_sequences,
    find_protein,
    load_proteins,
    read_proteins,
    split_proteins,
)
from performers.data.stream import stream_tokens
from performers.data.tokens import TokenDataset
from performers.data.vocabulary import (
    AMINO_ACIDS,
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    MASK_TOKEN_ID,
    PAD_TOKEN_ID,
    TOKENS,
    VOCAB_SIZE,
    decode,
    encode,
)

__all__ = [
    "AMINO_ACIDS",
    "BOS_TOKEN_ID",
    "EOS_TOKEN_ID",
    "MASK_TOKEN_ID",
    "NOT_SCORED",
    "PAD_TOKEN_ID",
    "TOKENS",
    "VOCAB_SIZE",
    "CausalCollator",
    "Collator",
    "EmpiricalBaseline",
    "FastaRecord",
    "MaskedCollator",
    "Protein",
    "ProteinSplits",
    "TokenDataset",
    "concatenate_sequences",
    "crop_sequences",
    "decode",
    "encode",
    "find_protein",
    "load_proteins",
    "mask_tokens",
    "read_fasta",
    "read_proteins",
    "read_texts",
    "split_proteins",
    "stream_tokens",
]
