"""`performers benchmark`: what attention costs on the machine of whoever asks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from performers.cli.errors import one_line_errors

__all__ = ["benchmark"]


def benchmark(
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute or two: up to L = 4096, float32.")
    ] = False,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="A length to time; give it more than once.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens to decode after; more than once.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, bfloat16 or float16; more than once.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each timing.")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Of one head.")] = 64,
    num_projections: Annotated[int, typer.Option(min=1, help="Projections m.")] = 256,
    memory: Annotated[
        bool, typer.Option(help="Measure the peak memory of a training step at the last length.")
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
) -> None:
    """Time one attention layer against exact attention, identity and performer-pytorch.

    Forward, forward and backward, peak memory of a training step, and decoding. Every mechanism
    takes its turn in every round; nothing is timed before it has matched its definition. Says from
    which length on a Performer is the faster choice here.

    Examples:

        performers benchmark --quick

        performers benchmark --length 4096 --length 65536 --dtype bfloat16 --threads 2
    """
    import torch

    from performers.benchmark import Plan, run
    from performers.viz.files import save_figure
    from performers.viz.speed import speed_figure

    with one_line_errors():
        if output.exists() and not force:
            raise FileExistsError(
                f"{output} holds an earlier result. Pass --force to replace it, or another "
                "--output."
            )
        torch.set_num_threads(threads)
        plan = Plan(
            heads=heads,
            dim=dim,
            num_projections=num_projections,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )
        plan = plan.quick() if quick else plan
        if length is not None:
            plan = replace(plan, lengths=tuple(sorted(length)), memory_lengths=(max(length),))
        if not memory:
            plan = replace(plan, memory_lengths=())
        if context is not None:
            plan = replace(plan, contexts=tuple(sorted(context)))
        if dtype is not None:
            plan = replace(plan, dtypes=tuple(dtype))
        if repeats is not None:
            plan = replace(plan, repeats=repeats)
        result = run(plan, typer.echo)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written = [output, *save_figure(speed_figure(result), output)]
    typer.echo("\n".join(["", *_verdict(result), "", *(f"Wrote {path}" for path in written)]))


def _verdict(result: dict[str, Any]) -> list[str]:
    """From which length on the Performer is faster than exact attention."""
    from performers.benchmark import crossover

    lines = []
    for dtype in result["plan"]["dtypes"]:
        for causal in (False, True):
            for part, words in (("forward", "inference"), ("forward_backward", "training")):
                length = crossover(result["time"], dtype, causal, part)
                mode = "causal" if causal else "bidirectional"
                what = f"{mode} {words} in {dtype}"
                longest = max(result["plan"]["lengths"])
                lines.append(
                    f"exact attention is faster up to L = {longest:,}: {what}"
                    if length is None
                    else f"a Performer is faster from about L = {length:,.0f}: {what}"
                )
    return lines
