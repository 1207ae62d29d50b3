"""The smallest experiment and the smallest command, as somebody who adds one would write them."""

EXPERIMENT = '''
"""An experiment that measures nothing."""

from dataclasses import dataclass

from performers.viz.files import Figure


@dataclass(frozen=True)
class Config:
    seed: int = 0


SIZES = Config()
CONFIGS = {"smoke": SIZES, "reduced": SIZES, "paper": SIZES}


def run(config, report):
    report("nothing to do")
    return {"answer": 42}


def figure(config, results):
    drawn = Figure()
    drawn.subplots().plot([0, results["answer"]])
    return drawn


def summary(config, results):
    return f"The answer is {results['answer']}. {'It was found without a computation. ' * 9}"
'''

README = """# Toy

<!-- results:toy -->
<!-- /results:toy -->
"""

COMMAND = '''
"""`performers toy`: a command that does nothing."""

from typing import Annotated

import typer

__all__ = ["toy"]


def toy(count: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
    """Do nothing, so many times.

    Example:

        performers toy --count 3
    """
    typer.echo("nothing " * count)
'''


def write_command(package):
    """Add the command `toy` to a copy of the package: a file, and its row in the table."""
    (package / "cli" / "toy.py").write_text(COMMAND, encoding="utf-8")
    table = package / "cli" / "app.py"
    text = table.read_text(encoding="utf-8")
    text = text.replace('    "train": train,\n', '    "toy": toy,\n    "train": train,\n')
    text = text.replace("import train\n", "import train\nfrom performers.cli.toy import toy\n")
    table.write_text(text, encoding="utf-8")


def write_experiment(experiments):
    """Add the experiment `toy` to a folder of experiments; returns its folder."""
    folder = experiments / "toy"
    folder.mkdir(parents=True)
    (folder / "experiment.py").write_text(EXPERIMENT, encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return folder
