"""`performers convert`: a pretrained model with FAVOR+ in the place of its attention."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from performers.cli.answers import Answer, remark
from performers.cli.errors import one_line_errors
from performers.cli.interrupts import saying_how_to_resume

if TYPE_CHECKING:
    from performers.convert.options import FavorOptions
    from performers.train.conversion_run import Conversion

__all__ = ["convert"]

# What `Fidelity` counts, in a table.
FIDELITY = {
    "distance": "distance to the exact model (KL, or 1 - cosine)",
    "agreement": "positions with its likeliest token",
    "neighbors": "sequences with its nearest neighbor",
}
# Options that a command with --resume does not repeat.
RESTART = ("--force", "--resume")


def convert(
    model: Annotated[str, typer.Argument(help="A model folder of transformers.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Text like what the model reads, some 100,000 words are good: a running text, or "
            "records (FASTA, JSON lines, CSV, Parquet)."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The model folder to write.")],
    data_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="text, lines (a record per line), fasta, json, csv or parquet. What the name of "
            "the file says, unless given.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The column of a table that holds the text; two of them make pairs."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(help="Measure settings, and take the cheapest with at most this mean error."),
    ] = None,
    num_projections: Annotated[
        int | None, typer.Option(min=1, help="Projections m. That of FavorOptions unless given.")
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="sharp unless given, or positive and others of FavorOptions.")
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="calibrated, or call (bidirectional only); for sharp features."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Keys of a block of this size and of its neighbors are scored exactly; 0: none. "
            "That of FavorOptions unless given, or larger ones in the place of an estimate.",
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Beside a window the first so many keys are scored exactly, too. Unless given, "
            "as many as bring the model closer to the exact one.",
        ),
    ] = None,
    far: Annotated[
        bool | None,
        typer.Option(
            "--far/--no-far",
            help="Estimate the keys beyond the window and the sinks, or leave them out. Unless "
            "given, the cheapest that keeps the model close to the exact one, of these, 64 heavy "
            "keys, a limited estimate and larger windows.",
        ),
    ] = None,
    far_limit: Annotated[
        float | None,
        typer.Option(
            help="Far keys weigh at most this multiple of the near keys of a query, such as 0.2."
        ),
    ] = None,
    heavy: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --no-far, keep this many far keys exact: those that near queries attended "
            "to most.",
        ),
    ] = None,
    exact_layers: Annotated[
        int,
        typer.Option(min=0, help="Layers that stay exact: those whose conversion costs most."),
    ] = 0,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 8,
    transfer_steps: Annotated[int, typer.Option(min=0, help="Steps of attention transfer.")] = 60,
    transfer_learning_rate: Annotated[float, typer.Option(help="Its learning rate.")] = 1e-3,
    steps: Annotated[int, typer.Option(min=0, help="Steps of fine-tuning.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Its learning rate.")] = 2e-5,
    lora: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="RANK",
            help="Fine-tune by LoRA of this rank (needs peft); 0: all weights.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the projections and of the order of the text.")] = 0,
    recovery: Annotated[
        bool, typer.Option("--recovery/--no-recovery", help="Train, or stop after calibration.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted conversion.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write over what is in the output folder.")
    ] = False,
) -> Answer:
    """Convert a pretrained encoder or language model to FAVOR+, and train it to recover its
    quality.

    Queries and keys of the exact model are measured (calibration). Then the projections of each
    attention layer learn to give what the exact layer gives (attention transfer), and all weights
    learn together (fine-tuning): a language model the predictions of the exact model, an encoder
    its last hidden states. Of both, what brings the model no closer to the exact one is undone.

    The fidelity is measured on text that is not trained on: the end of a running text, or a tenth
    of the records. performers.load_linearized loads the folder; the numbers are in conversion.json
    and conversion.png.

    Examples:

        performers convert path/to/model --data book.txt --output converted

        performers convert path/to/model --data book.txt --output calibrated --no-recovery

        performers convert path/to/model --data book.txt --output converted --error 0.2 --length 512

        performers convert path/to/model --data book.txt --output converted --window 64 --steps 500

        performers convert path/to/model --data book.txt --output mixed --exact-layers 2

        performers convert path/to/model --data proteins.fasta --output converted --window 32

        performers convert path/to/model --data pairs.jsonl --column a --column b --output converted

        performers convert path/to/model --data book.txt --output converted --resume
    """
    from performers.train.conversion_config import ConversionConfig
    from performers.train.conversion_run import Conversion

    with one_line_errors():
        measured = {
            "features": features,
            "window_size": window,
            "num_projections": num_projections,
            "far": far,
            "far_limit": far_limit,
            "num_heavy": heavy,
        }
        config = ConversionConfig(
            model=model,
            text=str(data),
            text_format=data_format,
            columns=tuple(column or ()),
            options=_options(error, measured, statistics=statistics, num_sinks=sinks, seed=seed),
            error=error,
            larger_blocks=window is None,
            exact_layers=exact_layers,
            length=length,
            batch_size=batch_size,
            transfer_steps=transfer_steps if recovery else 0,
            transfer_learning_rate=transfer_learning_rate,
            steps=steps if recovery else 0,
            learning_rate=learning_rate,
            lora_rank=lora,
            seed=seed,
        )
        conversion = Conversion.prepare(config, output, resume=resume, force=force)
    return _answer(_run(conversion), output)


def _run(conversion: Conversion) -> Mapping[str, Any]:
    """The record of a conversion; one that is interrupted says how to go on."""
    from performers.train.checkpoints import UnsavedError

    command = ["performers", *(word for word in sys.argv[1:] if word not in RESTART)]
    with (
        one_line_errors((FloatingPointError, ValueError, UnsavedError)),
        saying_how_to_resume(command),
    ):
        return conversion.run(remark)


def _answer(record: Mapping[str, Any], output: Path) -> Answer:
    """The table and where things are; the picture is drawn in the folder."""
    from performers.viz.conversion import conversion_figure
    from performers.viz.files import save_figure

    then = "draw the picture from conversion.json by conversion_figure: the model is whole."
    with one_line_errors((OSError,)):
        save_figure(conversion_figure(record), output / "conversion.png", then)
    places = (
        f"The model is in {output}; load it with performers.load_linearized. Numbers: "
        f"{output / 'conversion.json'}, picture: {output / 'conversion.png'}"
    )
    return Answer(record, f"{_table(record)}\n\n{places}")


def _options(error: float | None, measured: Mapping[str, Any], **others: Any) -> FavorOptions:
    """What was asked for. With an error, what it is measured to choose may not be asked for too."""
    from performers.convert.options import FavorOptions

    given = {name: x for name, x in measured.items() if x is not None}
    if error is not None and given:
        raise ValueError(
            f"--error chooses {', '.join(given)} by measuring: give either --error or these."
        )
    return FavorOptions(**given, **others)


def _table(record: Mapping[str, Any]) -> str:
    """The fidelity of the whole, the loss of its task and the error of every layer, by stage."""
    from performers.records import aligned

    stages = record["stages"]
    names = [name if found["is_kept"] else f"{name} (undone)" for name, found in stages.items()]
    rows = [["on text that was not trained on", *names]]
    for number, title in FIDELITY.items():
        found = [stage["fidelity"][number] for stage in stages.values()]
        if None not in found:
            rows.append([title, *(f"{x:.4f}" for x in found)])
    exact = record["exact_task_loss"]
    if exact is not None:
        losses = (f"{stage['task_loss']:.4f}" for stage in stages.values())
        rows.append([f"loss of its task (exact: {exact:.4f})", *losses])
    for name, error in record["averaging"].items():
        cells = (f"{stage['layers'][name]:.3f}" for stage in stages.values())
        rows.append([f"error of {name} (averaging: {error:.3f})", *cells])
    return "\n".join(aligned(rows))
