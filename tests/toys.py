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


def write_experiment(experiments):
    """Add the experiment `toy` to a folder of experiments; returns its folder."""
    folder = experiments / "toy"
    folder.mkdir(parents=True)
    (folder / "experiment.py").write_text(EXPERIMENT, encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return folder
