"""What docs/planning.md shows is what the commands print."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "write_plans.py"


@pytest.mark.slow
def test_the_plans_of_the_document_are_what_the_command_prints():
    specification = importlib.util.spec_from_file_location("write_plans", SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    document = script.DOCUMENT.read_text(encoding="utf-8")
    assert len(script.BLOCK.findall(document)) == 3
    assert script.with_outputs(document) == document
