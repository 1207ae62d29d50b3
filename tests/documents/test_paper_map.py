"""docs/paper-map.md names what exists and leaves out no number of the paper."""

import ast
import importlib
import re
from itertools import pairwise
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
MAP = ROOT / "docs" / "paper-map.md"

NUMBERS = {
    "Equation": range(1, 12),  # those beyond are steps of proofs
    "Lemma": range(1, 7),
    "Theorem": range(1, 8),
    "Definition": [1],
    "Remark": [1],
    "Algorithm": [1],
    "Figure": range(1, 22),
    "Table": range(1, 3),
}
APPENDICES = {
    *(f"A.{i}" for i in range(1, 7)),
    *(f"B.{i}" for i in range(1, 4)),
    *(f"C.{i}" for i in range(1, 5)),
    *(f"D.{i}" for i in range(1, 6)),
    "E",
    "F",
}


def rows(text):
    """The body rows of all tables, as lists of cells."""
    tokens = MarkdownIt().enable("table").parse(text)
    found = []
    for before, token in pairwise(tokens):
        if before.type == "tr_open" and token.type == "td_open":
            found.append([])
        if before.type == "td_open":
            found[-1].append(token.content)
    return found


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def missing_function(name):
    """Import the longest module of the dotted name and look up the rest; the name if that fails."""
    parts = ["performers", *name.split(".")]
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return [name] if found is None else []
    return [name]


def missing_test(name):
    """The name, unless the file has a test of that name."""
    file, _, function = name.partition("::")
    path = ROOT / "tests" / file
    if not path.is_file():
        return [name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return [] if function.startswith("test_") and function in found else [name]


ROWS = rows(MAP.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_function_and_test_of_a_row_exists(row):
    _, _, functions, tests, _ = row
    assert [missing for name in names(functions) for missing in missing_function(name)] == []
    assert [missing for name in names(tests) for missing in missing_test(name)] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_cell_names_something_or_says_why_not(row):
    """What is not covered says so; a function without a test does not pass in silence."""
    empty = [cell for cell in row[2:] if not re.search(r"`.+`|\]\(.+\)", cell)]
    assert set(empty) <= {"not yet", "–"}
    if names(row[2]):
        assert row[3] != "–"


def test_no_number_of_the_paper_is_missing():
    mapped = [row[0] for row in ROWS]
    expected = [f"{kind} {number}" for kind, all_of in NUMBERS.items() for number in all_of]
    expected += [f"Appendix {name}" for name in APPENDICES]
    assert [name for name in expected if mapped.count(name) != 1] == []


@pytest.mark.parametrize(
    ("check", "wrong", "right"),
    [
        (missing_function, "theory.mse_positivee", "theory.mse_positive"),
        (missing_function, "nonsense.mse", "nn.RandomFeatures.redraw"),
        (missing_test, "test_imports.py::test_nothing", "test_imports.py::test_imports_point_down"),
        (missing_test, "test_nowhere.py::test_it", "test_imports.py::test_imports_point_down"),
        (missing_test, "test_imports.py::violations", "test_imports.py::test_imports_point_down"),
    ],
)
def test_a_wrong_name_is_found(check, wrong, right):
    assert check(wrong) == [wrong]
    assert check(right) == []


def test_cells_of_a_table_are_read_row_by_row():
    assert rows("| a | b |\n|---|---|\n| `x.y` | not yet |\n| – | [l](m.md) |") == [
        ["`x.y`", "not yet"],
        ["–", "[l](m.md)"],
    ]
