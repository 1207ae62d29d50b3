"""The numbers in docs/explained.md say what the page advises."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "write_numbers.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("write_numbers", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def record(script):
    return json.loads(script.RESULTS.read_text(encoding="utf-8"))


def test_sharp_features_do_what_the_page_advises_them_for(script, record):
    """Below plain features and below averaging, in both directions, and lower with a window."""
    column = record["config"]["num_projections"].index(script.NUM_PROJECTIONS)
    for case in record["results"]["cases"]:
        plain, sharp, windowed = (
            case["errors"][name][column]["mean"] for name in ("FAVOR+", "sharp", "sharp, window 32")
        )
        assert windowed < sharp < min(plain, case["uniform"]["mean"])
