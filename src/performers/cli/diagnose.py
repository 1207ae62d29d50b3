"""`performers diagnose`: how well linear attention would do in each layer of a real model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

if TYPE_CHECKING:
    from performers.diagnosis import Diagnosis, Frontier
    from performers.diagnosis.captured import Captured

__all__ = ["diagnose"]


def diagnose(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_TENSORS",
            help="A model folder of transformers, or a safetensors file with query, key and value "
            "(or LAYER.query, …), each (batch, heads, length, dim).",
        ),
    ],
    text: Annotated[
        Path | None,
        typer.Option(
            help="A file for the model to read, needed for models: a text, or records (FASTA, JSON "
            "lines, CSV, Parquet) of at least LENGTH tokens."
        ),
    ] = None,
    text_format: Annotated[
        str | None,
        typer.Option("--format", help="text, lines (records), fasta, json, csv or parquet."),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="The column of a table that holds the text; two of them make pairs."),
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of the text to use.")] = 2,
    num_projections: Annotated[int, typer.Option(min=1, help="Projections m.")] = 256,
    window: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keys of a block of this size and of its neighbors are exact in 'sharp + window'.",
        ),
    ] = 32,
    sinks: Annotated[
        int, typer.Option(min=0, help="The first so many keys are exact beside each near field.")
    ] = 4,
    target_error: Annotated[
        float | None,
        typer.Option(
            help="Name the cheapest setting for this error, and the smallest m of each head (slow)."
        ),
    ] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Tensors of a file are those of causal attention.")
    ] = False,
    heads: Annotated[
        bool, typer.Option("--heads", help="Print a table of every head, not of layers alone.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="The picture to write, with the suffix .png and .svg.")
    ] = Path("diagnosis.png"),
) -> Answer:
    """Compare plain, sharp and windowed features with exact attention in every layer and head, and
    find the cheapest near field and m for an error.

    Costs are counted operations. For the settings on the frontier the time on this machine is
    measured too, beside that of exact attention. The pictures are OUTPUT and, of the settings,
    OUTPUT-frontier.

    Causal layers: sharp features are calibrated on the first half of the sequences, and the errors
    are those of the other half.

    Examples:

        performers diagnose path/to/model --text book.txt

        performers diagnose path/to/model --text book.txt --length 512 --heads --target-error 0.1

        performers diagnose path/to/model --text proteins.fasta --length 256

        performers diagnose attention.safetensors --causal --json
    """
    from performers.train.folders import check_file
    from performers.train.progress import frontier_with_bar
    from performers.viz.files import figure_files

    with one_line_errors():
        for place in figure_files(output):
            check_file(place)
        captured = _captured(source, text, text_format, column, length, sequences, causal)
        found = _compared(captured, num_projections, window, target_error)
        frontier = frontier_with_bar(captured, sinks)
    layers = {
        layer: {kind: dataclasses.asdict(diagnosis) for kind, diagnosis in kinds.items()}
        for layer, kinds in found.items()
    }
    settings = dataclasses.asdict(frontier)
    with one_line_errors((OSError,)):
        written = _drawn(layers, settings, output)
    words = _words(found, frontier, heads, target_error)
    words.append(f"Pictures: {', '.join(map(str, written))}")
    record = {"layers": layers, "frontier": settings, "pictures": written}
    return Answer(record, "\n\n".join(words))


def _words(
    found: dict[str, dict[str, Diagnosis]],
    frontier: Frontier,
    heads: bool,
    target_error: float | None,
) -> list[str]:
    """What is said of the layers and of the settings, a paragraph each."""
    from performers.diagnosis import recommendation

    words = [
        f"{layer}, {kind}\n{diagnosis}"
        for layer, kinds in found.items()
        for kind, diagnosis in kinds.items()
        if heads
    ]
    words += [_layers_table(found), recommendation(found), str(frontier)]
    if target_error is not None:
        words.append(_advice(frontier, target_error))
    return words


def _compared(
    captured: Sequence[Captured], num_projections: int, window: int, target_error: float | None
) -> dict[str, dict[str, Diagnosis]]:
    """Each layer by `compare`; without a window where queries and keys differ in number."""
    from tqdm.auto import tqdm

    from performers.diagnosis import compare

    found = {}
    for layer in tqdm(captured, "diagnosing layers"):
        found[layer.name] = compare(
            layer.query,
            layer.key,
            layer.value,
            num_projections,
            window_size=window if layer.query.shape[2] == layer.key.shape[2] else None,
            is_causal=layer.is_causal,
            scale=layer.scale,
            target_error=target_error,
        )
    return found


def _drawn(record: Mapping[str, Any], settings: Mapping[str, Any], output: Path) -> list[Path]:
    """The pictures of layers and settings; returns the files that were written."""
    from performers.viz.diagnosis import diagnosis_figure, frontier_figure
    from performers.viz.files import save_figure

    beside = output.with_stem(f"{output.stem}-frontier")
    return [
        *save_figure(diagnosis_figure(record), output),
        *save_figure(frontier_figure(settings), beside),
    ]


def _advice(frontier: Frontier, error: float) -> str:
    """The cheapest setting for an error, and whether it is worth having."""
    try:
        setting = frontier.within(error)
    except ValueError as refusal:
        return str(refusal)
    return f"For an error of {error:g}: {setting}, {frontier.cost(setting)}."


def _captured(
    source: str,
    text: Path | None,
    text_format: str | None,
    columns: Sequence[str] | None,
    length: int,
    sequences: int,
    causal: bool,
) -> Sequence[Captured]:
    """The queries, keys and values of each layer, from a file or of a model that reads the text."""
    from performers.convert import capture_text, read_captured
    from performers.data import read_texts

    path = Path(source)
    if path.is_file():
        return read_captured(path, causal)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder and no safetensors file at {path}.")
    if text is None:
        raise ValueError("a model needs something to read: pass --text FILE.")
    return capture_text(path, read_texts(text, text_format, columns or ()), length, sequences)


def _layers_table(found: Mapping[str, Mapping[str, Diagnosis]]) -> str:
    """The mean over the heads of each layer."""
    from performers.records import aligned

    kinds = next(iter(found.values()))
    header = ["error of the output", "averaging", *kinds, "E‖q + k‖²", "sharp", "features", "sharp"]
    rows = [header]
    for layer, of in found.items():
        plain, sharp = of["positive"], of["sharp"]
        rows.append(
            [
                layer,
                f"{plain.mean('uniform_error'):.3f}",
                *(f"{diagnosis.mean('observed_error'):.3f}" for diagnosis in of.values()),
                *(f"{x.mean('mean_square_sum'):.1f}" for x in (plain, sharp)),
                *(f"{x.mean('effective_features'):.1f}" for x in (plain, sharp)),
            ]
        )
    return "\n".join(aligned(rows))
