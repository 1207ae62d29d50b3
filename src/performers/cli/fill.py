"""`performers fill`: what a masked model expects at hidden residues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["fill"]


def fill(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or its model/ folder.")],
    sequence: Annotated[
        str, typer.Argument(help="A protein in which ? or <mask> hides a residue.")
    ],
    top: Annotated[int, typer.Option(help="Likeliest amino acids of each residue.")] = 5,
) -> Answer:
    """Print the likeliest amino acids of hidden residues, and the protein filled with them.

    Examples:

        performers fill runs/protein-mlm 'MKT?YIAKQR?SFVK'

        performers fill runs/protein-mlm 'MKT?YIAK' --top 3 --json
    """
    from performers.train import Filling

    with one_line_errors():
        filling = Filling.prepare(checkpoint, sequence, top=top)
    found = filling.run()
    return Answer(found, "\n".join([*map(_line, found["residues"]), found["sequence"]]))


def _line(residue: Mapping[str, Any]) -> str:
    """The position of a hidden residue, and what is likely there."""
    likely = "  ".join(f"{letter} {chance:.3f}" for letter, chance in residue["likely"].items())
    return f"{residue['position']:>6}  {likely}"
