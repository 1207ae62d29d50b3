"""`performers data proteins`: a set of proteins to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from performers.cli.answers import Answer, remark
from performers.cli.errors import MISTAKES, one_line_errors
from performers.cli.interrupts import saying_when_interrupted

__all__ = ["proteins"]


def proteins(
    output: Annotated[Path, typer.Argument(help="The file to write, NAME.fasta.gz.")],
    source: Annotated[
        str, typer.Option(help="swissprot (435,059 proteins), examples (18,801), or fasta.")
    ] = "swissprot",
    from_path: Annotated[
        list[Path] | None,
        typer.Option("--from", help="A .deb or unpacked folder to read instead of downloading."),
    ] = None,
    clustering: Annotated[
        Literal["mmseqs", "kmers"] | None,
        typer.Option(help="How homologues are found; chosen by size unless given."),
    ] = None,
) -> Answer:
    """Write a set of distinct proteins with clusters of homologues, and a card that says
    where it came from.

    Debian's packages of UniProt sequences are downloaded with apt-get.

    Examples:

        performers data proteins swissprot.fasta.gz

        performers data proteins mine.fasta.gz --source fasta --from a.fasta --from b.fasta.gz

        performers train protein-mlm 'data.source=[swissprot.fasta.gz]'
    """
    from performers.data.fetch import fetch_proteins

    kept = "An unfinished download is kept; go on with the same command."
    with saying_when_interrupted(kept), one_line_errors((*MISTAKES, RuntimeError)):
        card = fetch_proteins(
            output, source, from_paths=from_path or [], clustering=clustering, report=remark
        )
    counts = cast("dict[str, int]", card["counts"])
    words = ", ".join(f"{what} {number:,}" for what, number in counts.items())
    return Answer({"output": output, "card": card}, f"Wrote {output}: {words}.")
