"""Scoring a trained model on proteins, or on text where it reads that."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from performers.checks import check_count, check_seed
from performers.data.files import read_texts
from performers.data.proteins import crop_sequences, read_proteins
from performers.train.metrics import score_tokens, summarize
from performers.train.pretrained import check_length
from performers.train.texts import as_sequences
from performers.train.trained import Trained

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """A model and what it is scored on, all checked.

    `tokenizer`: that of a model which reads text.
    """

    model: PreTrainedModel
    task: str
    sequences: Dataset[dict[str, Tensor]]
    batch_size: int
    seed: int
    tokenizer: Any = None

    @classmethod
    def prepare(
        cls,
        checkpoint: Path,
        files: Sequence[Path],
        length: int = 1024,
        batch_size: int = 8,
        seed: int = 0,
    ) -> Evaluation:
        """Read the model and the files, FASTA files of proteins, duplicates of which are scored
        once, or files of text as `performers.data.read_texts` reads them.

        Raises ValueError or FileNotFoundError for what cannot be used.
        """
        check_count("length", length)
        check_count("batch size", batch_size)
        check_seed(seed)
        trained = Trained.load(checkpoint)
        model, tokenizer = trained.model, trained.tokenizer
        if tokenizer is not None:
            check_length("length", length, model.config)
            size = model.config.vocab_size
            parts = [
                as_sequences(read_texts(file), str(file), tokenizer, length, size) for file in files
            ]
            return cls(model, trained.name, ConcatDataset(parts), batch_size, seed, tokenizer)
        proteins, _ = read_proteins(files)
        dataset = crop_sequences([protein.sequence for protein in proteins], length)
        return cls(model, trained.name, dataset, batch_size, seed)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The paper's metrics, over all scored positions of all sequences."""
        task = Trained(self.model, self.task, self.tokenizer).task
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        collator = task.evaluation_collator(self.seed)
        loader = DataLoader(self.sequences, self.batch_size, collate_fn=collator)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in tqdm(loader, desc="evaluating"):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            sums += score_tokens(model(**inputs).logits, labels, shift=task.shift).sum(0)
        what = "proteins" if self.tokenizer is None else "sequences"
        count = len(cast("Sized", self.sequences))
        return {"task": self.task, what: count, **summarize(*sums.tolist())}
