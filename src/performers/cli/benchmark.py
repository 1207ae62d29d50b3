"""`performers benchmark`: what attention costs on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from performers.cli.answers import Answer, remark
from performers.cli.errors import one_line_errors
from performers.cli.interrupts import saying_when_interrupted

__all__ = ["benchmark"]


def benchmark(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A minute or two: up to L = 4096, float32; neither memory nor models."
        ),
    ] = False,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="A length to time; give it more than once.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens to decode after; more than once.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="plain, relu, sharp, near-field, near-field-wide or near-alone; more than once. "
            "Else all."
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; more than once.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each timing.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 1,
    heads: Annotated[int, typer.Option(min=1, help="Of the layer.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Of one head.")] = 64,
    num_projections: Annotated[
        int, typer.Option(min=1, help="Projections m of plain, relu and sharp.")
    ] = 256,
    memory: Annotated[
        bool, typer.Option(help="Measure the peak memory of a training step, at 4096 or --length.")
    ] = True,
    models: Annotated[
        bool, typer.Option(help="Time a step of whole models, at 4096 or the last --length.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help='"cpu" or "cuda"; a GPU is used where there is one.')
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="On a CPU. One is timed by CPU time, the steadiest clock.")
    ] = 1,
    output: Annotated[
        Path, typer.Option(help="Where the numbers go; the picture lies beside them.")
    ] = Path("benchmark.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
) -> Answer:
    """Time one attention layer, in each recommended setting, and what one could use instead.

    They are compared with exact attention, the identity and performer-pytorch. Measured are the
    forward pass, forward and backward together, peak memory of a training step, whole models, and
    decoding. A percentage says what share of the time the matrix products and exponentials alone
    would take (the floor). Every mechanism takes its turn in every round, and nothing is timed
    before it has matched its definition. At the end the command says from which length on each
    setting is faster than exact attention here. What is measured is kept as the work goes on: an
    interrupted command goes on where it was when it is given again.

    Examples:

        performers benchmark --quick

        performers benchmark --setting near-field --length 1024 --length 4096 --dtype bfloat16
    """
    import torch

    from performers.records import read_json, replace_text
    from performers.speed import Plan, run
    from performers.train.folders import check_file
    from performers.viz.files import figure_files, save_figure
    from performers.viz.speed import speed_figure

    with one_line_errors():
        for place in (output, *figure_files(output)):
            check_file(place)
        if output.exists() and not force:
            raise FileExistsError(
                f"{output} holds an earlier result. Pass --force to replace it, or another "
                "--output."
            )
        torch.set_num_threads(threads)
        plan = Plan(
            batch=batch,
            heads=heads,
            dim=dim,
            num_projections=num_projections,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        changes = _changes(length, context, setting, dtype, repeats, memory, models)
        unfinished = output.with_name(output.name + ".unfinished")
        remedy = f"Delete {unfinished} and begin anew."
        begun = read_json(unfinished, remedy) if unfinished.exists() else None
        if begun:
            remark(f"Going on with {unfinished}. To begin anew, delete it.")
        output.parent.mkdir(parents=True, exist_ok=True)

        def keep(result: dict[str, Any]) -> None:
            replace_text(unfinished, json.dumps(result, indent=1, allow_nan=False) + "\n")

        kept = "What was measured is kept; go on with the same command."
        with saying_when_interrupted(kept):
            planned = replace(plan.quick() if quick else plan, **changes)
            result = run(planned, remark, keep, begun)
    with one_line_errors((OSError,)):
        written = [output, *save_figure(speed_figure(result), output)]
        unfinished.replace(output)
    return Answer(result, [*_verdict(result), "", *(f"Wrote {path}" for path in written)])


def _changes(
    length: list[int] | None,
    context: list[int] | None,
    setting: list[str] | None,
    dtype: list[str] | None,
    repeats: int | None,
    memory: bool,
    models: bool,
) -> dict[str, Any]:
    """What the options change of a `Plan`."""
    changes: dict[str, Any] = {}
    if length is not None:
        lengths = tuple(sorted(length))
        changes["lengths"] = lengths
        changes["memory_lengths"] = changes["model_lengths"] = lengths[-1:]
    if not memory:
        changes["memory_lengths"] = ()
    if not models:
        changes["model_lengths"] = ()
    if setting is not None:
        changes["settings"] = tuple(dict.fromkeys(setting))
    if context is not None:
        changes["contexts"] = tuple(sorted(context))
    if dtype is not None:
        changes["dtypes"] = tuple(dtype)
    if repeats is not None:
        changes["repeats"] = repeats
    return changes


def _verdict(result: dict[str, Any]) -> list[str]:
    """A table: from which length on each setting is faster than exact attention."""
    from performers.records import aligned
    from performers.speed import wins_from
    from performers.speed.timing import PARTS

    rows = [["faster than exact attention from L =", "inference", "training"]]
    for dtype in result["plan"]["dtypes"]:
        for causal in (False, True):
            for name in result["plan"]["settings"]:
                mode = "causal" if causal else "bidirectional"
                cells = [wins_from(result["time"], name, dtype, causal, part) for part in PARTS]
                rows.append([f"{mode}, {dtype}, {name}", *cells])
    return aligned(rows)
