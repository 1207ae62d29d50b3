"""What a run trains and is evaluated on: proteins in memory, split here, or a stream of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from performers.checks import check_count
from performers.data.fasta import distinct_records, read_fasta
from performers.data.proteins import (
    SPLITS,
    ProteinSplits,
    concatenate_sequences,
    crop_sequences,
    listed,
    load_proteins,
)
from performers.data.stream import TokenStream
from performers.data.tokens import TokenDataset

__all__ = [
    "DataConfig",
    "Splits",
    "StreamConfig",
    "StreamedProteins",
    "check_text",
    "checked_stream",
    "read_data",
]

# What says how sets are split off, which a stream is given instead.
OF_SPLITTING = ("split_by", "valid_fraction", "test_fraction", "ood_fraction")

# What says how a text is read, and what is said of proteins alone.
OF_TEXT = ("text_format", "columns")
OF_PROTEINS = ("source", "stream", "concatenate", "split_by", "ood_fraction")


@dataclass(frozen=True)
class StreamConfig:
    """Files that are read while the run trains on them: see `performers.data.stream_tokens`.

    `valid`, `test`, `ood`: the sets that are held out, FASTA files of their own. To split whole
    clusters off takes all sequences at once. Their sequences are never trained on.
    `shuffle_buffer`: letters that are shuffled together.
    """

    valid: str | list[str]
    test: str | list[str] = ""
    ood: str | list[str] = ""
    shuffle_buffer: int = 10_000_000


@dataclass(frozen=True)
class DataConfig:
    """Which proteins, or which text, and how they become sequences of tokens.

    Of proteins: see `performers.data.load_proteins`.

    `source`: "sample" is the set that ships with the package; else FASTA files, gzipped or not.
    `length`, `concatenate`: proteins cropped to 1024 tokens or joined into windows of 8192 are the
    paper's two tasks (Appendix C.1).
    `split_by` and the fractions: what is held out, whole clusters of similar sequences by default.
    `stream`: for files that do not fit into memory.

    `text`, `text_format`, `columns`: in the place of `source`, a file of text, see
    `performers.data.read_texts`, that the tokenizer of a pretrained model reads, or a model of its
    own byte by byte. The fractions of a running text are taken off its end.
    """

    source: str | list[str] = "sample"
    length: int = 1024
    concatenate: bool = False
    split_by: str = "cluster"
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    ood_fraction: float = 0.1
    stream: StreamConfig | None = None
    text: str | None = None
    text_format: str | None = None
    columns: list[str] = field(default_factory=list)

    @property
    def files(self) -> str | list[str]:
        """What is read."""
        return self.source if self.text is None else self.text


def check_text(data: DataConfig) -> None:
    """Raise ValueError for keys of the section `data` that do not go together."""
    unset = DataConfig()
    if data.text is None:
        for key in OF_TEXT:
            if getattr(data, key) != getattr(unset, key):
                raise ValueError(
                    f"data.{key} says how data.text is read, and there is none. Leave it out, or "
                    "give the file as data.text."
                )
        return
    for key in OF_PROTEINS:
        if getattr(data, key) != getattr(unset, key):
            raise ValueError(
                f"data.{key} is of proteins, and data.text takes their place. Leave one of the two "
                "out."
            )


def checked_stream(stream: Mapping[str, Any], data: Mapping[str, Any]) -> StreamConfig:
    """The section `data.stream`, beside what is given of the section `data`.

    Raises ValueError for what does not fit together.
    """
    unset = DataConfig()
    for key in OF_SPLITTING:
        if data.get(key, getattr(unset, key)) != getattr(unset, key):
            raise ValueError(
                f"data.{key} says how sets are split off, which takes all sequences at once: leave "
                "it out beside data.stream, and give files as data.stream.valid."
            )
    if data.get("source", "sample") == "sample":
        raise ValueError("data.stream needs files to read: give them as data.source.")
    if not stream.get("valid"):
        raise ValueError("data.stream.valid must be a file: the curves of a run need a set.")
    checked = StreamConfig(**stream)
    check_count("data.stream.shuffle_buffer", checked.shuffle_buffer, least=0)
    return checked


@dataclass(frozen=True, eq=False)
class StreamedProteins:
    """A stream to train on, and sets that are held out."""

    train: TokenStream
    valid: TokenDataset
    test: TokenDataset
    ood: TokenDataset

    def summary(self) -> dict[str, int]:
        """Counts for a report, of what is known without reading all."""
        files = [Path(path) for path in self.train.paths]
        return {"train_files": len(files), "train_bytes": sum(f.stat().st_size for f in files)}

    def description(self, source: str | Sequence[str]) -> str:
        """What the sets are made of, in words."""
        size = self.summary()["train_bytes"]
        return f"{listed(source)}, read as a stream: {size:,} bytes to train on"


Splits = ProteinSplits | StreamedProteins


def read_data(config: DataConfig, seed: int, num_workers: int) -> Splits:
    """What the section `data` of a config describes. `num_workers`: of each process.

    Raises what `load_proteins` and `stream_tokens` raise, and ValueError for more workers than a
    stream has pieces.
    """
    if config.stream is None:
        of_text = ("stream", "text", *OF_TEXT)
        options = {key: value for key, value in vars(config).items() if key not in of_text}
        return load_proteins(**options, seed=seed)
    build = concatenate_sequences if config.concatenate else crop_sequences
    held_out: dict[str, TokenDataset] = {}
    left_out: set[str] = set()
    for name in SPLITS[1:]:
        files = getattr(config.stream, name)
        records = distinct_records(read_fasta(files)) if files else []
        sequences = [record.sequence for record in records]
        held_out[name] = build(sequences, config.length)
        left_out |= set(sequences)
    train = TokenStream(
        [config.source] if isinstance(config.source, str) else config.source,
        config.length,
        concatenate=config.concatenate,
        shuffle_buffer=config.stream.shuffle_buffer,
        seed=seed,
        left_out=left_out,
    )
    if num_workers > train.num_pieces:
        raise ValueError(
            f"trainer.dataloader_num_workers must be at most {train.num_pieces}, because workers "
            f"divide the pieces of the files, got {num_workers}. A gzipped file is one piece: "
            "unpack it, or split it into several."
        )
    return StreamedProteins(train, **held_out)
