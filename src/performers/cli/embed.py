"""`performers embed`: vectors of proteins, or of their residues, from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors
from performers.cli.interrupts import saying_how_to_resume

__all__ = ["embed"]


def embed(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    data: Annotated[list[Path], typer.Argument(help="FASTA files, gzipped or not.")],
    output: Annotated[
        Path, typer.Option(help="Where the embeddings go, a file for numpy.load.")
    ] = Path("embeddings.npz"),
    pooling: Annotated[
        str,
        typer.Option(help='"mean": a vector for each protein; "residue": one for each residue.'),
    ] = "mean",
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens of a batch at most: fewer take less memory.")
    ] = 16384,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
) -> Answer:
    """Write the embeddings of proteins, in the order of the files.

    The file holds ids and embeddings, the last hidden states of the residues. With
    --pooling residue, those of protein i are embeddings[starts[i] : starts[i + 1]].

    Examples:

        performers embed runs/demo proteins.fasta.gz --output proteins.npz

        performers embed runs/demo proteins.fasta.gz --pooling residue --resume
    """
    from performers.train import Embedding, UnsavedError

    with one_line_errors():
        embedding = Embedding.prepare(
            checkpoint,
            data,
            output,
            pooling=pooling,
            batch_tokens=batch_tokens,
            resume=resume,
            force=force,
        )
    command = ["performers", "embed", str(checkpoint), *map(str, data), "--output", str(output)]
    command += ["--pooling", pooling, "--batch-tokens", str(batch_tokens)]
    with saying_how_to_resume(command, "part"), one_line_errors((UnsavedError,)):
        found = embedding.run()
    words = (
        f"Wrote {found['output']}: {found['proteins']:,} proteins of {found['residues']:,} "
        f"residues, vectors of {found['dim']}."
    )
    return Answer(found, words)
