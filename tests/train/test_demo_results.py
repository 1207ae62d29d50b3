"""The README's table is what the code makes of the committed numbers, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "demo" / "write_table.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("write_table", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_table_in_the_readme_is_the_committed_results(script):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert script.with_table(readme, metrics) == readme


def test_the_committed_demo_beats_the_empirical_baseline(script):
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    for split, baseline in metrics["baseline"].items():
        for model in metrics["models"]:
            assert model["metrics"][split]["accuracy"] > baseline["accuracy"]
            assert model["metrics"][split]["perplexity"] < baseline["perplexity"]


def test_a_document_without_the_block_is_refused(script):
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="one block between"):
        script.with_table("# performers", metrics)
