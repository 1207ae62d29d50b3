"""Training of the tiny model that comes with the page, for some seconds, on the sample."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import torch
from torch import Generator

from performers.data import CausalCollator, load_proteins
from performers.explore.parts import progress
from performers.explore.subject import Subject

__all__ = ["SECONDS", "train"]

SECONDS = 30
LENGTH, BATCH_SIZE, LEARNING_RATE = 128, 16, 3e-3


def train(subject: Subject, seconds: float) -> Iterator[str]:
    """Train the model to predict the next residue for so many seconds; yields a bar with its loss
    after every step. What it has learned stays when this is ended early.
    """
    yield progress(0, seconds, "the sample is read")
    proteins, collator = load_proteins("sample", length=LENGTH).train, CausalCollator()
    optimizer = torch.optim.AdamW(subject.model.parameters(), LEARNING_RATE)
    generator = Generator().manual_seed(0)
    guessed = math.log2(len(collator.scored_token_ids))
    began = time.perf_counter()
    for step in itertools.count(1):
        chosen = torch.randint(len(proteins), (BATCH_SIZE,), generator=generator).tolist()
        with subject.lock, torch.enable_grad():
            loss = subject.model(**collator([proteins[index] for index in chosen])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            subject.forget()
        elapsed = time.perf_counter() - began
        bits = loss.item() / math.log(2)
        words = (
            f"step {step}, {elapsed:.0f} s: {bits:.2f} bits per residue ({guessed:.2f} by guessing)"
        )
        yield progress(elapsed, seconds, words)
        if elapsed >= seconds:
            return
