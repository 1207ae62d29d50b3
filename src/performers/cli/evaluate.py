"""`performers evaluate`: how well a trained model predicts any proteins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["evaluate"]


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    data: Annotated[
        list[Path],
        typer.Argument(help="FASTA files, gzipped or not; or files of text."),
    ],
    length: Annotated[int, typer.Option(help="Crop sequences to this many tokens.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the masked positions.")] = 0,
) -> Answer:
    """Print accuracy, perplexity and bits per character of a model on proteins, or on text, where a
    token is what is called a character.

    Examples:

        performers evaluate runs/demo proteins.fasta.gz

        performers evaluate runs/demo/model one.fasta two.fasta --length 512 --json
    """
    from performers.train import Evaluation, scores_table

    with one_line_errors():
        evaluation = Evaluation.prepare(
            checkpoint, data, length=length, batch_size=batch_size, seed=seed
        )
    scores = evaluation.run()
    return Answer(scores, scores_table(scores))
