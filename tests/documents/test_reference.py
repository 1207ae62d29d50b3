"""The reference of the site has every public name."""

import importlib
import re
from pathlib import Path

import performers

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
# Rooms that users come through by commands, or that serve other rooms.
WITHOUT_PAGE = {"backends", "cli", "explore", "records", "reproduction", "speed", "viz"}


def test_every_public_package_has_a_page_that_the_index_lists() -> None:
    packages = {path.parent.name for path in (ROOT / "src" / "performers").glob("*/__init__.py")}
    pages = {path.stem for path in REFERENCE.glob("*.md")} - {"index"}
    assert packages - WITHOUT_PAGE <= pages
    listed = re.findall(r"^\w+$", (REFERENCE / "index.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(pages)


def test_every_exported_name_is_on_a_page() -> None:
    names: set[str] = set()
    for page in REFERENCE.glob("*.md"):
        for module in re.findall(r"automodule:: (\S+)", page.read_text()):
            names.update(importlib.import_module(module).__all__)
    assert set(performers.__all__) <= names
