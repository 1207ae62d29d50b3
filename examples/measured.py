"""What all examples share: a command line, and figures that a run writes into the documents.

An example is a file of this folder with a function `run` and two sets of its settings. The last
paragraph of its docstring, from "Measured" on, is what `python examples/NAME.py --write` measured;
README.md lists the same figures.
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from performers.records import describe_environment, write_block

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
BLOCK = "examples"

Figures = dict[str, str]


def command(file: str, run: Callable[[Any], Figures], full: Any, small: Any) -> None:
    """Run an example with the options of the command line, and print its figures.

    `full`, `small`: dataclasses of its settings, each of which is an option of the command as well.
    """
    path = Path(file)
    parser = argparse.ArgumentParser(
        description=described(path),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--small", action="store_true", help="what the tests run, in seconds")
    parser.add_argument("--write", action="store_true", help="write the figures into the documents")
    for field in fields(full):
        value = getattr(full, field.name)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), metavar="X", help=f"{value} unless given")
    given = vars(parser.parse_args())
    is_small, is_written = given.pop("small", False), given.pop("write", False)
    if is_written and (is_small or given):
        parser.error("--write is for the settings of the file: leave out --small and the others.")
    start = time.process_time()
    figures = run(replace(small if is_small else full, **given))
    seconds = time.process_time() - start
    if is_written:
        path.write_text(with_figures(path.read_text("utf-8"), figures, seconds), "utf-8")
        write_block(README, BLOCK, listing())
    for name, figure in figures.items():
        print(f"{name}: {figure}")


def described(path: Path) -> str:
    """The docstring of an example, which is not imported for it."""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring, f"{path} has no docstring"
    return docstring


def figures_of(path: Path) -> Figures:
    """What the docstring of an example says was measured."""
    _, _, measured = described(path).partition("\n\nMeasured ")
    lines = re.findall(r"^    (.+?): (.+)$", measured, re.MULTILINE)
    return dict(lines)


def with_figures(source: str, figures: Figures, seconds: float) -> str:
    """The source of an example with these figures at the end of its docstring."""
    environment = describe_environment()
    made = (
        f"Measured in {seconds:.0f} s of CPU time on {environment['processor']}, "
        f"{torch.get_num_threads()} thread(s), torch {environment['packages']['torch']}:"
    )
    lines = "\n".join(f"    {name}: {figure}" for name, figure in figures.items())
    text = f"\n\n{textwrap.fill(made, 100)}\n\n{lines}\n"
    end = re.search(r'(\n\nMeasured .*?|\n)"""\n', source, re.DOTALL)
    assert end, "the docstring of an example ends on a line of its own"
    return f'{source[: end.start()]}{text}"""\n{source[end.end() :]}'


def listing() -> str:
    """Every example, what it shows, and its figures, as README.md has them."""
    lines = []
    for path in sorted(FOLDER.glob("*.py")):
        if path != Path(__file__):
            shown = described(path).split("\n\n")[0].replace("\n", " ")
            lines.append(f"- [{path.name}]({path.name}): {shown}")
            lines += [f"  - {name}: {figure}" for name, figure in figures_of(path).items()]
    return "\n".join(lines)
