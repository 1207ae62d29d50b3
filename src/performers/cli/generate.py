"""`performers generate`: proteins, or text, that a trained model makes up."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["generate"]


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    prompt: Annotated[str, typer.Option(help="What every sample begins with.")] = "",
    count: Annotated[int, typer.Option(help="How many samples.")] = 5,
    length: Annotated[int, typer.Option(help="Longest sample, the prompt included.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Below 1 the likely gets likelier; 0 always takes the likeliest.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same samples.")] = 0,
) -> Answer:
    """Sample proteins from a causal model and print them as FASTA, or text from a converted one.

    Examples:

        performers generate runs/protein-clm --count 3

        performers generate runs/protein-clm --prompt MKTAYIAK --temperature 0.8 > new.fasta
    """
    from tqdm.auto import tqdm

    from performers.train import Generation

    with one_line_errors():
        generation = Generation.prepare(
            checkpoint,
            prompt=prompt,
            count=count,
            length=length,
            temperature=temperature,
            seed=seed,
        )
    # In a terminal the proteins themselves show how far it is.
    bar = tqdm(generation.run(), "generating", count, disable=sys.stdout.isatty())
    return Answer(
        ({**asdict(sample), "length": len(sample.sequence)} for sample in bar),
        (generation.written(sample) for sample in bar),
    )
