"""A page that the package names, in a message, a help text or a docstring, is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# As in "see docs/conversion.md", and "(DESIGN.md, Numerics)" for a section.
NAMED = re.compile(r"(?P<page>[\w./-]*\w\.md)\b(, (?P<section>[A-Z][\w ]+))?")


def missing(text: str) -> list[str]:
    """The pages and sections that a text names and that the repository lacks."""
    lacking = []
    for name in NAMED.finditer(" ".join(text.split())):
        page = ROOT / name["page"]
        if not page.is_file():
            lacking.append(name["page"])
        elif name["section"]:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            if not any(name["section"].startswith(heading) for heading in headings):
                lacking.append(name[0])
    return lacking


def test_the_package_names_pages() -> None:
    named = {name["page"] for path in SOURCES for name in NAMED.finditer(path.read_text("utf-8"))}
    assert {"DESIGN.md", "docs/conversion.md", "docs/migration.md"} <= named


def test_every_page_and_section_that_the_package_names_is_there() -> None:
    lacking = {path.name: missing(path.read_text("utf-8")) for path in SOURCES}
    assert {name: pages for name, pages in lacking.items() if pages} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("must be a model: docs/conversion.md lists them.", []),
        ("must be a model: docs/conversions.md lists them.", ["docs/conversions.md"]),
        ("two softmaxes (DESIGN.md, Numerics): with", []),
        ("two softmaxes (DESIGN.md,\n    Numbers): with", ["DESIGN.md, Numbers"]),
    ],
)
def test_a_page_or_section_that_is_not_there_is_found(text: str, expected: list[str]) -> None:
    assert missing(text) == expected
