"""What a masked model expects at hidden residues of a protein."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from performers.checks import check_count
from performers.data.tokens import frame_tokens
from performers.data.vocabulary import (
    AMINO_ACID_IDS,
    MASK_TOKEN_ID,
    TOKENS,
    encode,
)
from performers.models import PerformerForMaskedLM
from performers.train.trained import load_of_proteins

__all__ = ["Filling"]

HIDDEN_LETTER = "?"


@dataclass(frozen=True)
class Filling:
    """A masked model and a protein with hidden residues, checked."""

    model: PerformerForMaskedLM
    sequence: str
    top: int

    @classmethod
    def prepare(cls, checkpoint: Path, sequence: str, top: int = 5) -> Filling:
        """Read the model and check the protein, in which ? or <mask> hides one residue.

        Raises ValueError for letters that are no amino acids, for a protein in which nothing is
        hidden, and for a causal model.
        """
        check_count("top", top)
        sequence = sequence.replace(TOKENS[MASK_TOKEN_ID], HIDDEN_LETTER)
        if HIDDEN_LETTER not in sequence:
            raise ValueError(
                f"the protein must hide a residue: write {HIDDEN_LETTER} or <mask> in its place, "
                f"for example MKT{HIDDEN_LETTER}YIAK."
            )
        encode(sequence.replace(HIDDEN_LETTER, "X"))
        model, task = load_of_proteins(checkpoint)
        if not isinstance(model, PerformerForMaskedLM):
            raise ValueError(
                f"{checkpoint} must hold a masked model, which sees both sides of a residue, and "
                f"it was trained for {task}. Train one with task=masked-lm, or continue a protein "
                "with performers generate."
            )
        return cls(model, sequence, min(top, len(AMINO_ACID_IDS)))

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Of every hidden residue the likeliest amino acids, and the protein with the likeliest.

        Probabilities are over amino acids. All residues are predicted at once, each without
        knowing what the others become.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        tokens = encode(self.sequence.replace(HIDDEN_LETTER, "X"))
        places = [i for i, letter in enumerate(self.sequence) if letter == HIDDEN_LETTER]
        tokens[places] = MASK_TOKEN_ID
        logits = model(frame_tokens(tokens)[None].to(device)).logits[0, 1:-1]
        first = AMINO_ACID_IDS.start
        likely = logits[places, first:].float().softmax(dim=-1).cpu().topk(self.top, dim=-1)
        letters = list(self.sequence)
        residues = []
        for place, chances, ids in zip(places, likely.values, likely.indices, strict=True):
            found = [TOKENS[first + int(token)] for token in ids]
            letters[place] = found[0]
            residues.append(
                {"position": place + 1, "likely": dict(zip(found, chances.tolist(), strict=True))}
            )
        return {"sequence": "".join(letters), "residues": residues}
