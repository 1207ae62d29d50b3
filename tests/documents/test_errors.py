"""docs/errors.md has every message that the package refuses an input with."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "collect_errors.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("collect_errors", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_source(script):
    """If not, run python docs/collect_errors.py."""
    assert script.DOCUMENT.read_text(encoding="utf-8") == script.page()


def test_a_message_is_found_with_what_a_call_fills_in_left_open(script):
    source = """
class Reader:
    def read(self, path):
        if not path:
            raise ValueError(f"{path} must be " "a path: " + f"got {path!r}. {ADVICE}".rstrip())
        assert path, "not for the caller"
        raise

    def refusal(self):
        return TypeError("must not be.")
"""
    assert list(script.messages(source)) == [
        ("Reader.read", "ValueError", "… must be a path: got …. …"),
        ("Reader.refusal", "TypeError", "must not be."),
    ]
