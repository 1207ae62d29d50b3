"""`performers plan`: what a run would need of each device, before one is rented."""

from __future__ import annotations

from typing import Annotated

import typer

from performers.cli.answers import Answer
from performers.cli.errors import one_line_errors

__all__ = ["plan"]


def plan(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped config (see `info`).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the config to set, dotted."),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many accelerators train together.")] = 1,
    memory: Annotated[str, typer.Option(help="What each has, such as 80GiB.")] = "80GiB",
) -> Answer:
    """Print the memory, operations and communication of a training run, from formulas.

    One column for each layout: sequences of its own for every device (data), weights that are
    shared out (sharded), and sequences that are (sequence). Neither data nor a device is needed.

    Examples:

        performers plan protein-mlm

        performers plan protein-mlm --devices 256 --memory 8GiB

        performers plan protein-long data.length=1048576 --devices 8
    """
    from performers.planning import plan_layouts, plan_words, workload_of
    from performers.planning.tables import bytes_of
    from performers.train import load_config

    with one_line_errors():
        workload = workload_of(load_config(config, overrides or []))
        record = plan_layouts(workload, devices, bytes_of(memory))
    return Answer(record, plan_words(record))
