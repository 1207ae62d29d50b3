"""The demo's table has the numbers of the run, and they show what the README says."""

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
        for cell, name in zip(row[4:], ("peak_memory", "resident_memory"), strict=True):
            size = float(cell.removesuffix(" MiB")) * 2**20
            assert size == pytest.approx(model[name], abs=0.51 * 2**20)
    assert len(rows) == len(metrics["models"]) + 1  # and the empirical baseline


def test_the_models_of_the_committed_demo_trained_for_the_same_time(script):
    """Each until the end of the step in which the time ran out, from the same first batch on."""
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert [m["attention"] for m in metrics["models"][1:]] == metrics["config"]["compare"]
    limit = metrics["config"]["max_seconds"]
    for model in metrics["models"]:
        assert next(entry["step"] for entry in model["history"] if "loss" in entry) == 1
        before_the_last_step = model["history"][-3]["seconds"]
        assert before_the_last_step < limit <= model["seconds"]
        assert model["tokens"] == model["steps"] * metrics["config"]["data"]["length"]


def test_in_the_same_time_and_less_memory_a_performer_gets_further_than_exact_attention(script):
    metrics = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    models = {model["attention"]: model for model in metrics["models"]}
    first, exact = metrics["models"][0], models["exact"]
    assert first["tokens"] >= 3 * exact["tokens"]
    assert first["peak_memory"] < exact["peak_memory"]
    bits = [model["metrics"]["valid"]["bits_per_character"] for model in (first, exact)]
    assert bits[0] < bits[1] < metrics["baseline"]["valid"]["bits_per_character"]
