"""Sampling new proteins, or text, from a trained causal model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from performers.checks import check_count, check_number, check_seed
from performers.data.vocabulary import (
    BOS_TOKEN_ID,
    EOS_TOKEN_ID,
    MASK_TOKEN_ID,
    PAD_TOKEN_ID,
    decode,
    encode,
)
from performers.train.trained import Trained

__all__ = ["Generation"]

LINE_WIDTH = 60


@dataclass(frozen=True)
class Sample:
    """What a model made up. `is_complete`: the model ended it, before the length did."""

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
    """A causal model and how is to be sampled from it, all checked.

    `length`: of a protein in residues, of text in tokens, the prompt included. `tokenizer`: that of
    a model which reads text.
    """

    model: PreTrainedModel
    prompt: str
    count: int
    length: int
    temperature: float
    seed: int
    tokenizer: Any = None

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

        Raises ValueError for a prompt with letters that are no amino acids, for none where a text
        needs one to begin with, for a masked model, and for numbers out of range.
        """
        check_count("count", count)
        check_count("length", length)
        check_seed(seed)
        check_number("temperature", temperature, or_zero=True)
        trained = Trained.load(checkpoint)
        if trained.name != "causal-lm":
            raise ValueError(
                f"{checkpoint} must hold a causal model to sample from, and it was trained for "
                f"{trained.name}. Train one with task=causal-lm, for example performers train "
                "protein-clm."
            )
        tokenizer = trained.tokenizer
        generation = cls(trained.model, prompt, count, length, temperature, seed, tokenizer)
        given = len(generation.start()) if tokenizer is not None else len(encode(prompt))
        if given >= length:
            what = "residues" if tokenizer is None else "tokens"
            raise ValueError(f"length must exceed that of the prompt: {length} and {given} {what}.")
        return generation

    def start(self) -> Int64[Tensor, " length"]:
        """The tokens that every sample begins with."""
        if self.tokenizer is None:
            return torch.cat([torch.tensor([BOS_TOKEN_ID]), encode(self.prompt)])
        found = list(self.tokenizer(self.prompt)["input_ids"])
        while found and found[-1] == self.tokenizer.eos_token_id:
            found.pop()  # a tokenizer that ends every text
        if not found and self.tokenizer.bos_token_id is not None:
            found = [self.tokenizer.bos_token_id]
        if not found:
            raise ValueError(
                "this model has no token to begin a text with: give a prompt, with --prompt."
            )
        return torch.tensor(found)

    def written(self, sample: Sample) -> str:
        """A protein as a record of FASTA, text as it is."""
        return sample.fasta() if self.tokenizer is None else sample.sequence

    @torch.no_grad()
    def run(self) -> Iterator[Sample]:
        """One sample after another. The state of the model has a constant size, however long they
        get.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device)
        start = self.start()[None].to(device)
        if self.tokenizer is None:
            most, ends, padding = self.length - len(self.prompt), EOS_TOKEN_ID, PAD_TOKEN_ID
            never = [PAD_TOKEN_ID, BOS_TOKEN_ID, MASK_TOKEN_ID]
        else:
            most, ends = self.length - start.shape[1], self.tokenizer.eos_token_id
            padding, never = self.tokenizer.pad_token_id or 0, None
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=most,
            eos_token_id=ends,
            pad_token_id=padding,
            suppress_tokens=never,
            **sampling,
        )
        for number in range(self.count):
            torch.manual_seed(self.seed + number)
            mask = torch.ones_like(start)
            tokens = model.generate(start, attention_mask=mask, generation_config=settings)[0].cpu()
            ended = ends is not None and bool((tokens[start.shape[1] :] == ends).any())
            if self.tokenizer is None:
                sequence = decode(tokens[1 : -1 if ended else None])
            else:
                sequence = self.tokenizer.decode(tokens, skip_special_tokens=True)
            yield Sample(f"sample_{number + 1}", sequence, ended, self.seed + number)
