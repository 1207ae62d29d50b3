"""What is added in one file and one row is found by the suites, which fail while it is wrong.

Toys are added to a copy of the package, each once as it should be and once with a fault, and the
suites run on the copy in a process of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toys

import performers

ROOT = Path(__file__).parents[1]


def add_commands(copy):
    package = copy / "src/performers"
    toys.write_command(package)
    assert toys.COMMAND.count("toy --count") == 1
    toys.write_command(package, "faulty", toys.COMMAND.replace("toy --count", "toy --times"))


def add_experiments(copy):
    folder = copy / "experiments"
    toys.write_experiment(folder)
    assert toys.EXPERIMENT.count('[0, results["answer"]]') == 1
    faulty = toys.EXPERIMENT.replace('[0, results["answer"]]', '[0, results["question"]]')
    toys.write_experiment(folder, "faulty", faulty)


# What adds the two toys that a suite should find, the second with a fault.
TOYS = {
    "tests/cli/test_commands.py": add_commands,
    "tests/experiments/test_reproduce.py": add_experiments,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(PASSED or FAILED, suite, toy) of every test of a toy."""
    copy = tmp_path_factory.mktemp("copy")
    # The package finds its experiments beside itself.
    shutil.copytree(Path(performers.__file__).parent, copy / "src/performers")
    for add in TOYS.values():
        add(copy)
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(copy / "src")
    # Without the checks of shapes, which say nothing of toys and take as long as all the rest.
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-rA"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-k", "toy or faulty", *TOYS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    found = re.findall(
        r"^(PASSED|FAILED) (tests/\S+\.py)::\w+\[(toy|faulty)\]", done.stdout, re.MULTILINE
    )
    assert found, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("suite", TOYS)
def test_a_suite_finds_what_is_added_and_fails_while_it_is_wrong(suite, outcomes):
    results = {
        toy: [outcome for outcome, *of in outcomes if of == [suite, toy]]
        for toy in ("toy", "faulty")
    }
    assert set(results["toy"]) == {"PASSED"}
    assert results["faulty"].count("FAILED") == 1
    assert len(results["faulty"]) == len(results["toy"])
