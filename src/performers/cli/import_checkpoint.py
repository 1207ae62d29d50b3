"""`performers import-checkpoint`: a model of another library as a model of this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["import_checkpoint"]


def import_checkpoint(
    source: Annotated[
        Path, typer.Argument(help="A file of torch.save, safetensors or numpy.savez.")
    ],
    output: Annotated[Path, typer.Option(help="The model folder to write.")],
    library: Annotated[
        str, typer.Option(help="performer-pytorch, fast-transformers or google-jax.")
    ],
    causal: Annotated[
        bool, typer.Option("--causal/--no-causal", help="Whether attention was causal.")
    ] = False,
    features: Annotated[
        str | None,
        typer.Option(help="positive, hyperbolic, a kernel such as relu, or exact, unless default."),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Heads, where the checkpoint does not say how many.")
    ] = None,
    num_projections: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many where the checkpoint has no projections."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option(help="Of feed-forward layers, in the words of transformers.")
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="Of the products of queries and keys, unless default.")
    ] = None,
    prefix: Annotated[
        str, typer.Option(help="Read only the weights whose names begin so, such as module.")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write over what is in the output folder.")
    ] = False,
) -> Answer:
    """Import a model that was trained with another library, with equal outputs.

    A checkpoint does not say all that its model computed. Options say the rest, where it is not
    what the library does by default; docs/migration.md has the list. The folder is one of
    transformers: its config.json says what differs from other models here (dialect), and where the
    weights are from (origin).

    Examples:

        performers import-checkpoint model.pt --library performer-pytorch --output imported

        performers import-checkpoint model.pt --library performer-pytorch --output lm --causal

        performers import-checkpoint model.pt --library fast-transformers --output lm --heads 8

        performers import-checkpoint model.npz --library google-jax --output lm --features relu
    """
    from performers import migration
    from performers.models import PerformerPreTrainedModel
    from performers.train.checkpoints import UnsavedError, saving

    with one_line_errors():
        _check_output(output, force)
        model = migration.import_checkpoint(
            source,
            library,
            is_causal=causal,
            features=features,
            num_heads=heads,
            num_projections=num_projections,
            hidden_act=activation,
            scale=scale,
            prefix=prefix,
        )
        if not isinstance(model, PerformerPreTrainedModel):
            raise ValueError(
                f"{source} must be a model, and is an attention layer alone, which transformers "
                "has no folder for: import it in Python, with performers.import_checkpoint."
            )
    again = "give the command again, with --force."
    with one_line_errors((UnsavedError,)), saving(output, again):
        model.save_pretrained(output)
    kind, weights, dialect = type(model).__name__, model.num_parameters(), model.config.dialect
    record = {"output": output, "model": kind, "weights": weights, "dialect": dialect}
    words = (
        f"{output}: a {kind} of {weights:,} weights. As {library} does, and no other model here: "
        f"{dialect}"
    )
    return Answer(record, words)


def _check_output(output: Path, force: bool) -> None:
    from performers.train.folders import check_place

    check_place(output)
    if not force and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"the output folder {output} already holds something. Add --force to write over it, or "
            "choose another with --output."
        )
