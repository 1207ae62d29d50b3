"""Scoring a trained model on proteins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from performers.checks import check_count, check_seed
from performers.data.proteins import crop_sequences, read_proteins
from performers.data.tokens import TokenDataset
from performers.train.checkpoints import load_model
from performers.train.metrics import score_tokens, summarize
from performers.train.tasks import TASKS, Model

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """A model and the proteins to score it on, all checked."""

    model: Model
    task: str
    proteins: TokenDataset
    batch_size: int
    seed: int

    @classmethod
    def prepare(
        cls,
        checkpoint: Path,
        files: Sequence[Path],
        length: int = 1024,
        batch_size: int = 8,
        seed: int = 0,
    ) -> Evaluation:
        """Read the model and the FASTA files; duplicates are scored once.

        Raises ValueError or FileNotFoundError for what cannot be used.
        """
        check_count("length", length)
        check_count("batch size", batch_size)
        check_seed(seed)
        model, task = load_model(checkpoint)
        proteins, _ = read_proteins(files)
        dataset = crop_sequences([protein.sequence for protein in proteins], length)
        return cls(model, task, dataset, batch_size, seed)

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """The paper's metrics, over all scored positions of all proteins."""
        task = TASKS[self.task]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        collator = task.evaluation_collator(self.seed)
        loader = DataLoader(self.proteins, self.batch_size, collate_fn=collator)
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for batch in tqdm(loader, desc="evaluating"):
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            sums += score_tokens(model(**inputs).logits, labels, shift=task.shift).sum(0)
        return {"task": self.task, "proteins": len(self.proteins), **summarize(*sums.tolist())}
