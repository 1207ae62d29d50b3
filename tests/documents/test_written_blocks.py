"""What stands between two comments of a document is what code makes of the committed numbers."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from performers.records import with_block, write_block

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]


def is_writer(path):
    """Whether a script writes a block of a document: it has DOCUMENT, BLOCK, RESULTS and table.

    RESULTS is the path of a file, or paths by name.
    """
    return re.search(r"^    +write_block\(DOCUMENT, BLOCK, ", path.read_text("utf-8"), re.MULTILINE)


SCRIPTS = [
    path
    for folder in ("benchmarks", "docs", "experiments", "tests", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__) and is_writer(path)
]


def loaded(path):
    specification = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


def read(results):
    if isinstance(results, dict):
        return {name: read(path) for name, path in results.items()}
    return json.loads(results.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_is_what_its_script_makes_of_the_committed_numbers(path):
    script = loaded(path)
    document = script.DOCUMENT.read_text(encoding="utf-8")
    results = read(script.RESULTS)
    assert with_block(document, script.BLOCK, script.table(results)) == document


def test_every_block_of_a_document_has_a_script():
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert sorted(re.findall(r"<!-- /(\S+) -->", text)) == sorted(
        loaded(path).BLOCK for path in SCRIPTS
    )


def test_only_the_text_of_the_block_is_replaced():
    document = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\nkept\n<!-- /y -->\n"
    new = with_block(document, "x", r"new \1")
    assert new == document.replace("old", r"new \1")
    assert with_block(new, "x", "old") == document


@pytest.mark.parametrize("document", ["# Mine\n", "<!-- x -->\n", 2 * "<!-- x -->\n<!-- /x -->\n"])
def test_a_document_without_just_one_such_block_is_refused_and_left_alone(document, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.md: the document must have one block between"):
        write_block(path, "x", "new")
    assert path.read_text(encoding="utf-8") == document
