"""Embeddings of proteins by a trained model, for whatever is to be learned from them.

    proteins ─► by length ─► batches ─► a part of the result for each ─► one file, in file order

Parts are written one after another, each in one step, so an interrupted run goes on with the next.
Batches follow from the proteins and the options alone; a resumed run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from performers.checks import check_choice, check_count
from performers.data.fasta import FastaRecord, read_fasta
from performers.data.tokens import frame_tokens
from performers.data.vocabulary import PAD_TOKEN_ID, encode
from performers.records.files import FAULTS, read_json, replace_text
from performers.train.checkpoints import saving
from performers.train.folders import check_file
from performers.train.tasks import Model
from performers.train.trained import load_of_proteins

__all__ = ["POOLINGS", "Embedding"]

# What a protein becomes: the mean of its residues' vectors, or one vector for each residue.
POOLINGS = ("mean", "residue")
PLAN = "plan.json"

RESUME = "go on with --resume. Every whole part is kept."


@dataclass(frozen=True)
class Embedding:
    """A model, proteins, and where their embeddings go, all checked."""

    model: Model
    records: list[FastaRecord]
    output: Path
    pooling: str
    batch_tokens: int
    plan: dict[str, str]

    @classmethod
    def prepare(
        cls,
        checkpoint: Path,
        files: Sequence[Path],
        output: Path,
        pooling: str = "mean",
        batch_tokens: int = 16384,
        resume: bool = False,
        force: bool = False,
    ) -> Embedding:
        """Read the model and the FASTA files, and make a place for the parts.

        `batch_tokens`: tokens of a batch at most, padding included; a longer protein is one by
        itself. `resume` goes on with the parts of an interrupted run, `force` replaces an earlier
        result.

        Raises ValueError, FileNotFoundError or FileExistsError for what cannot be used.
        """
        check_choice("pooling", pooling, POOLINGS)
        check_count("batch_tokens", batch_tokens)
        if output.suffix != ".npz":
            raise ValueError(f"output must be a file named .npz, got {output}.")
        check_file(output)
        if output.exists() and not force:
            raise FileExistsError(
                f"{output} exists already. Name another file, or replace it with --force."
            )
        model, _ = load_of_proteins(checkpoint)
        records = list(read_fasta(files))
        longest = max(len(record.sequence) for record in records) + 2
        most = model.config.max_position_embeddings
        if model.config.position == "learned" and longest > most:
            raise ValueError(
                f"the model has learned {most} positions, and the longest protein takes "
                f"{longest}. Leave out proteins of more than {most - 2} residues, or use a model "
                'with position="rotary".'
            )
        plan = {
            "model": _digest_of_weights(model),
            "proteins": _digest_of_proteins(records),
            "pooling": pooling,
            "batch_tokens": str(batch_tokens),
        }
        embedding = cls(model, records, output, pooling, batch_tokens, plan)
        embedding._make_place(resume, force)
        return embedding

    @property
    def parts(self) -> Path:
        """The folder of an unfinished result, beside where it will be."""
        return self.output.with_name(self.output.name + ".parts")

    def _make_place(self, resume: bool, force: bool) -> None:
        if force and not resume and self.parts.is_dir():
            shutil.rmtree(self.parts)
        if (self.parts / PLAN).is_file():
            if not resume:
                raise FileExistsError(
                    f"{self.parts} holds an interrupted run. Go on with --resume, or begin anew "
                    "with --force."
                )
            remedy = f"Delete {self.parts} and begin anew."
            begun = read_json(self.parts / PLAN, remedy)
            changed = [name for name in self.plan if begun.get(name) != self.plan[name]]
            if changed:
                raise ValueError(
                    f"{self.parts} was begun with another {' and another '.join(changed)}. Resume "
                    "with what it was begun with, or begin anew with --force."
                )
            return
        if resume and not self.parts.is_dir():
            raise FileNotFoundError(
                f"there is nothing to resume: {self.parts} does not exist. Leave out --resume."
            )
        with saving(self.parts, RESUME):
            self.parts.mkdir(parents=True, exist_ok=True)
        replace_text(self.parts / PLAN, json.dumps(self.plan, indent=1), RESUME)

    def batches(self) -> list[list[int]]:
        """Numbers of proteins of similar length, so that there is little padding."""
        lengths = [len(record.sequence) + 2 for record in self.records]
        batches: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: (lengths[number], number)):
            if batches and (len(batches[-1]) + 1) * lengths[number] <= self.batch_tokens:
                batches[-1].append(number)
            else:
                batches.append([number])
        return batches

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Embed what is missing, and write the result: counts for a report.

        The file has `ids` (of all records, in file order), `embeddings`, and for residues
        `starts`: those of protein i are embeddings[starts[i] : starts[i + 1]].
        """
        batches = self.batches()
        done = [self._is_whole(index, batch) for index, batch in enumerate(batches)]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        residues = [sum(len(self.records[number].sequence) for number in x) for x in batches]
        already = sum(count for count, is_done in zip(residues, done, strict=True) if is_done)
        with tqdm(
            total=sum(residues), initial=already, desc="embedding", unit="residues", unit_scale=True
        ) as bar:
            for index, batch in enumerate(batches):
                if not done[index]:
                    sequences = [self.records[number].sequence for number in batch]
                    rows = torch.cat(list(self._embed(model, sequences, device)))
                    self._write_part(index, rows.cpu())
                    bar.update(residues[index])
        self._join(batches)
        shutil.rmtree(self.parts)
        return {
            "proteins": len(self.records),
            "residues": sum(residues),
            "dim": model.config.hidden_size,
            "output": str(self.output),
        }

    def _embed(
        self, model: Model, sequences: Sequence[str], device: torch.device
    ) -> Iterator[Float[Tensor, "rows hidden"]]:
        """The last hidden states of the residues of each protein, or their mean."""
        framed = [frame_tokens(encode(x)) for x in sequences]
        tokens = pad_sequence(framed, batch_first=True, padding_value=PAD_TOKEN_ID).to(device)
        mask = tokens != PAD_TOKEN_ID
        hidden = model.performer(tokens, attention_mask=mask).last_hidden_state.float()
        for row, sequence in zip(hidden, sequences, strict=True):
            residues = row[1 : len(sequence) + 1]
            yield residues if self.pooling == "residue" else residues.mean(dim=0, keepdim=True)

    def _part(self, index: int) -> Path:
        return self.parts / f"part-{index:06}.npy"

    def _is_whole(self, index: int, batch: Sequence[int]) -> bool:
        """Whether a part is there with all its rows; one that is damaged is made again."""
        try:
            rows = np.load(self._part(index), mmap_mode="r")
        except (OSError, *FAULTS):
            return False
        shape = (self._count(batch), self.model.config.hidden_size)
        return isinstance(rows, np.ndarray) and (rows.dtype, rows.shape) == (np.float32, shape)

    def _count(self, batch: Sequence[int]) -> int:
        """The vectors of these proteins."""
        if self.pooling == "mean":
            return len(batch)
        return sum(len(self.records[number].sequence) for number in batch)

    def _write_part(self, index: int, rows: Float[Tensor, "rows hidden"]) -> None:
        path = self._part(index)
        partial = path.with_suffix(".partial")
        with saving(path, RESUME):
            with partial.open("wb") as file:
                np.save(file, rows.numpy(), allow_pickle=False)
            partial.replace(path)

    def _join(self, batches: list[list[int]]) -> None:
        """Write the result, a protein at a time: all residues may not fit into memory."""
        counts = [self._count([number]) for number in range(len(self.records))]
        places: dict[int, tuple[int, int]] = {}  # of a protein: its part, and its first row there
        for index, batch in enumerate(batches):
            row = 0
            for number in batch:
                places[number] = index, row
                row += counts[number]
        parts = [np.load(self._part(index), mmap_mode="r") for index in range(len(batches))]
        partial = self.output.with_name(self.output.name + ".partial")
        arrays = {"ids": np.array([record.identifier for record in self.records])}
        if self.pooling == "residue":
            arrays["starts"] = np.concatenate([[0], np.cumsum(counts)])
        with saving(self.output, RESUME):
            # numpy.savez would take the embeddings as one array in memory.
            with zipfile.ZipFile(partial, "w") as archive:
                for name, array in arrays.items():
                    buffer = BytesIO()
                    np.save(buffer, array, allow_pickle=False)
                    archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue())
                header = {"descr": "<f4", "fortran_order": False}
                header["shape"] = (sum(counts), self.model.config.hidden_size)
                whole = zipfile.ZipInfo("embeddings.npy")
                with archive.open(whole, "w", force_zip64=True) as file:
                    np.lib.format.write_array_header_1_0(file, header)
                    for number, count in enumerate(counts):
                        index, row = places[number]
                        file.write(parts[index][row : row + count].astype("<f4").tobytes())
            partial.replace(self.output)


def _digest_of_weights(model: Model) -> str:
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of_proteins(records: Sequence[FastaRecord]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(f"{record.identifier}\n{record.sequence}\n".encode())
    return digest.hexdigest()
