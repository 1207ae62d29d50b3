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
    return f"The answer is {results['answer']}."
'''

README = """# Toy

<!-- results:toy -->
<!-- /results:toy -->
"""

COMMAND = '''
"""`performers toy`: a command that does nothing."""

from typing import Annotated

import typer

from performers.cli.answers import Answer

__all__ = ["toy"]


def toy(count: Annotated[int, typer.Option(help="How often.")] = 1) -> Answer:
    """Do nothing, so many times.

    Example:

        performers toy --count 3
    """
    return Answer({"count": count}, "nothing " * count)
'''


def write_command(package, name="toy", source=COMMAND):
    """Add a command to a copy of the package: a file, and its row in the table."""
    (package / "cli" / f"{name}.py").write_text(source.replace("toy", name), encoding="utf-8")
    table = package / "cli" / "app.py"
    text = table.read_text(encoding="utf-8")
    for before, row in (
        ("from performers.cli.train import", f"from performers.cli.{name} import {name}"),
        ('    "train": train,', f'    "{name}": {name},'),
    ):
        assert text.count(before) == 1
        text = text.replace(before, f"{row}\n{before}")
    table.write_text(text, encoding="utf-8")


def write_experiment(experiments, name="toy", source=EXPERIMENT):
    """Add an experiment to a folder of experiments; returns its own folder."""
    folder = experiments / name
    folder.mkdir(parents=True)
    (folder / "experiment.py").write_text(source, encoding="utf-8")
    (folder / "README.md").write_text(README.replace("toy", name), encoding="utf-8")
    return folder
