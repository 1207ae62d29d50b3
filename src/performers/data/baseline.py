"""The empirical baseline: predictions from the frequencies of the amino acids alone.

Source: Choromanski et al. 2021, Appendix C.2 (what it is) and A.1 (the metrics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from performers.data.masking import NOT_SCORED, Collator
from performers.data.stream import TokenStream
from performers.data.tokens import TokenDataset
from performers.data.vocabulary import AMINO_ACID_IDS, AMINO_ACIDS

__all__ = ["EmpiricalBaseline"]


@dataclass(frozen=True)
class EmpiricalBaseline:
    """One distribution for every position: the token frequencies of the training set.

        p(a) = (count of a + 1) / (tokens + number of kinds)      over the tokens that can be scored

    Adding one to each count keeps the perplexity finite when a letter occurs only in the evaluation
    set.
    """

    log_probabilities: Float64[Tensor, " vocabulary"]

    @classmethod
    def fit(
        cls, train: TokenDataset | TokenStream, scored_token_ids: Sequence[int]
    ) -> EmpiricalBaseline:
        """Count the training set, cropped as the models see it; of a stream, its beginning.

        `scored_token_ids` is the collator's: the baseline must not give probability to tokens that
        are never scored.
        """
        scored = torch.tensor(scored_token_ids)
        counts = train.token_counts()[scored].double() + 1
        log_probabilities = torch.full((train.vocab_size,), -torch.inf, dtype=torch.float64)
        log_probabilities[scored] = (counts / counts.sum()).log()
        return cls(log_probabilities)

    def evaluate(self, dataset: TokenDataset, collator: Collator) -> dict[str, float]:
        """Accuracy, perplexity and bits per character on the positions that the collator scores.

        Keys: `loss` (nats), `accuracy`, `perplexity` = exp(loss), `bits_per_character` =
        loss / ln 2 and `num_scored`. A model evaluated with the same collator is scored on the same
        positions.

        Raises ValueError when no position is scored.
        """
        vocab_size = len(self.log_probabilities)
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for index in range(len(dataset)):
            labels = collator([dataset[index]])["labels"]
            counts += torch.bincount(labels[labels != NOT_SCORED], minlength=vocab_size)
        num_scored = int(counts.sum())
        if num_scored == 0:
            raise ValueError(
                "the empirical baseline needs at least one scored position: the dataset is empty."
            )
        present = counts > 0
        loss = -float(counts[present].double() @ self.log_probabilities[present]) / num_scored
        return {
            "loss": loss,
            "accuracy": int(counts[self.log_probabilities.argmax()]) / num_scored,
            "perplexity": math.exp(loss),
            "bits_per_character": loss / math.log(2),
            "num_scored": num_scored,
        }

    def frequencies(self) -> dict[str, float]:
        """The probability of each amino acid by its letter (Fig. 9 of the paper)."""
        probabilities = self.log_probabilities.exp().tolist()
        return {
            letter: probabilities[token]
            for letter, token in zip(AMINO_ACIDS, AMINO_ACID_IDS, strict=True)
        }
