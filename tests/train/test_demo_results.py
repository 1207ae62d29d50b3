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


def test_the_cells_of_the_table_are_the_numbers_of_the_run(script):
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    _, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in script.table(metrics).splitlines()
        if line.startswith("|")
    ]
    for model, row in zip(metrics["models"], rows, strict=False):
        valid = model["metrics"]["valid"]
        assert row[0] == f"`{model['attention']}`"
        assert int(row[1].replace(",", "")) == model["tokens"]
        assert float(row[2].rstrip("%")) / 100 == pytest.approx(valid["accuracy"], abs=5.1e-5)
        assert float(row[3]) == pytest.approx(valid["bits_per_character"], abs=5.1e-4)
        assert float(row[4].removesuffix(" MiB")) * 2**20 == pytest.approx(
            model["peak_memory"], abs=0.51 * 2**20
        )
    assert len(rows) == len(metrics["models"]) + 1  # and the empirical baseline


def test_the_committed_demo_shows_what_performers_are_for(script):
    """For equal time, up to one step: more tokens than exact attention, and fewer bits."""
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    performer, exact, identity = metrics["models"]
    assert [exact["attention"], identity["attention"]] == ["exact", "identity"]
    limit = metrics["config"]["max_seconds"]
    for model in metrics["models"]:
        assert limit <= model["seconds"] < limit + 3 * model["seconds"] / model["steps"]
    assert performer["tokens"] >= 3 * exact["tokens"]
    reached, baseline = performer["metrics"]["valid"], metrics["baseline"]["valid"]
    for other in (exact["metrics"]["valid"], baseline):
        assert reached["bits_per_character"] < other["bits_per_character"]


def test_a_document_without_the_block_is_refused(script):
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="one block between"):
        script.with_table("# performers", metrics)
