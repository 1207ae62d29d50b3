"""The numbers in docs/migration.md give the reasons that the page gives."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "measure_migration.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("measure_migration", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def found(script):
    return json.loads(script.RESULTS.read_text(encoding="utf-8"))["results"]


def test_only_with_signs_is_the_estimate_unbiased(found):
    here, there = found["signs"]["here"], found["signs"]["there"]
    assert abs(here["mean"] - 1) < 4 * here["error"]
    assert there["mean"] + 4 * there["error"] < 1


def test_an_epsilon_makes_attention_uniform_at_the_norms_of_normal_entries(found):
    for size in ("1.0", "2.0"):
        of = found["uniform"][size]
        assert of["there"] < 0.05 * of["exact"]
        assert of["here"] > of["exact"]


def test_the_future_reaches_the_past_only_there(found):
    assert found["future"]["here"] == 0 < found["future"]["there"]


def test_padding_shrinks_outputs_only_there(found):
    for share, of in found["padding"].items():
        assert of["here"] == pytest.approx(1, abs=1e-4)
        assert of["there"] < 1.2 * (1 - float(share))


def test_the_script_measures_what_the_page_shows(script, found):
    measured = script.measure(draws=3, length=20, heads=1)
    assert {name: set(of) for name, of in measured.items()} == {
        name: set(of) for name, of in found.items()
    }
