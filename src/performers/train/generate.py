"""Sampling new proteins from a trained causal model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from performers.checks import check_count, check_number, check_seed
from performers.data.vocabulary import (
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    MASK_TOKEN_ID,
    PAD_TOKEN_ID,
    decode,
    encode,
)
from performers.models import PerformerForCausalLM
from performers.train.checkpoints import load_model

__all__ = ["Generation"]

LINE_WIDTH = 60


@dataclass(frozen=True)
class Sample:
    """A protein that a model made up. `is_complete`: the model ended it, before the length did."""

    name: str
    sequence: str
    is_complete: bool
    seed: int

    def fasta(self) -> str:
        """The protein as a record of FASTA."""
        length = len(self.sequence)
        note = "complete" if self.is_complete else f"cut at {length}"
        starts = range(0, length, LINE_WIDTH)
        lines = [self.sequence[start : start + LINE_WIDTH] for start in starts]
        return "\n".join([f">{self.name} length={length} {note} seed={self.seed}", *lines])


@dataclass(frozen=True)
class Generation:
    """A causal model and how proteins are to be sampled from it, all checked."""

    model: PerformerForCausalLM
    prompt: str
    count: int
    length: int
    temperature: float
    seed: int

    @classmethod
    def prepare(
        cls,
        checkpoint: Path,
        prompt: str = "",
        count: int = 5,
        length: int = 256,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> Generation:
        """Read the model and check the request.

        Raises ValueError for a prompt with letters that are no amino acids, for a masked model, and
        for numbers out of range.
        """
        check_count("count", count)
        check_count("length", length)
        check_seed(seed)
        check_number("temperature", temperature, or_zero=True)
        encode(prompt)
        if len(prompt) >= length:
            raise ValueError(
                f"length must exceed that of the prompt: {length} and {len(prompt)} residues."
            )
        model, task = load_model(checkpoint)
        if not isinstance(model, PerformerForCausalLM):
            raise ValueError(
                f"{checkpoint} must hold a causal model to sample from, and it was trained for "
                f"{task}. Train one with task=causal-lm, for example performers train protein-clm."
            )
        return cls(model, prompt, count, length, temperature, seed)

    @torch.no_grad()
    def run(self) -> Iterator[Sample]:
        """One protein after another. The state of the model has a constant size, however long they
        get.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        start = torch.cat([torch.tensor([BOS_TOKEN_ID]), encode(self.prompt)])[None].to(device)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=self.length - len(self.prompt),
            eos_token_id=EOS_TOKEN_ID,
            pad_token_id=PAD_TOKEN_ID,
            suppress_tokens=[PAD_TOKEN_ID, BOS_TOKEN_ID, MASK_TOKEN_ID],
            **sampling,
        )
        for number in range(self.count):
            torch.manual_seed(self.seed + number)
            tokens = model.generate(start, generation_config=settings)[0, 1:].cpu()
            ended = bool((tokens == EOS_TOKEN_ID).any())
            sequence = decode(tokens[: -1 if ended else None])
            yield Sample(f"sample_{number + 1}", sequence, ended, self.seed + number)
