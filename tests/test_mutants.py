"""Mutation testing finds what a test misses, and writes into no module."""

import ast
import json

import mutants
import pytest

SOURCE = '''
LIMIT = 10

def clipped(x: "int | None", low=0):
    """Between the limits."""
    assert x is not None
    if x < low:
        return low
    if x > LIMIT:
        raise ValueError(f"{x + 1} is too large")
    return min(x, key=None, default=low)
'''


def words(source):
    return [mutant.words for mutant in mutants.mutants(ast.parse(source))]


def test_bodies_of_functions_are_mutated_and_neither_defaults_nor_assertions_nor_messages():
    assert words(SOURCE) == [
        "x < low → x <= low",
        "x < low → x >= low",
        "return None",
        "x > LIMIT → x >= LIMIT",
        "x > LIMIT → x <= LIMIT",
        "without raise ValueError(f'{x + 1} is too large')",
        "return None",
        "without key=None",
        "without default=low",
    ]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("a + b", ["a + b → a - b"]),
        ("a and not b", ["a and (not b) → a or not b", "not b → b"]),
        ("a += 0.5", ["a += 0.5 → a -= 0.5", "without a += 0.5", "0.5 → 1.0"]),
        ("b = a if c else True", ["a if c else True → True if c else a", "True → False"]),
        ("b = b.to(a, device=a)", ["without b = b.to(a, device=a)"]),
        ("b.c = a", ["without b.c = a"]),
        ("b = a", []),
        ("f = lambda x: x is a", ["x is a → x is not a"]),
        ("if f(a):\n  return", ["if not f(a)"]),
        ("a = zip(a, strict=True)", ["without a = zip(a, strict=True)"]),  # an assertion
    ],
)
def test_each_kind_of_edit(statement, expected):
    assert words(f"def f(a, b, c):\n {statement}") == expected
    if statement.startswith("f = lambda"):
        assert words(statement) == expected


def test_the_record_names_survivors_and_no_file_is_touched(tmp_path, fresh_python):
    toy, tests = tmp_path / "toy.py", tmp_path / "test_toy.py"
    toy.write_text(
        "def clipped(x, low=0):\n    if x < low:\n        return low\n    return x\n"
        "def adder(n):\n    def add(x):\n        return x + n\n    return add\n"
        "one_more = adder(1)\n"
    )
    tests.write_text(
        "import pytest\nfrom toy import clipped, one_more\n"
        "@pytest.mark.parametrize('x', [3, 5, 7])\n"
        "def test_large(x): assert clipped(x) == x\n"
        "def test_small(): assert clipped(-1) == 0\n"
        "def test_more(): assert one_more(4) == 5\n"
        "def test_unrelated(): pass\n"
    )
    before = {path: path.read_bytes() for path in (toy, tests)}
    found = fresh_python(f"""
import contextlib, io, json, os
sys.path[:0] = [{str(mutants.__file__.rpartition("/")[0])!r}, {str(tmp_path)!r}]
from pathlib import Path
import mutants
os.chdir({str(tmp_path)!r})
results = []
with contextlib.redirect_stdout(io.StringIO()):
    module = mutants.Module(Path({str(toy)!r}), seed=0, sample=9, only=None)
    mutants.mutate([module], ["test_toy.py"], 2, lambda module, found: results.extend(found))
print(json.dumps(results))
""")
    killers = {entry["change"]: killer for entry, killer in json.loads(found)}
    assert killers.keys() == {
        "x < low → x <= low", "x < low → x >= low", "return None", "x + n → x - n"
    }  # fmt: skip
    assert killers["x < low → x <= low"] is None  # they are the same where x = low
    assert killers["x < low → x >= low"].startswith("test_toy.py::test_")
    assert killers["x + n → x - n"] == "test_toy.py::test_more"  # of a function made at import
    assert {path: path.read_bytes() for path in before} == before


def test_explanations_stay_and_what_is_killed_says_by_whom():
    def entry(change, column=7):
        where = {"line": 3, "column": column, "function": "f", "text": "return a + b"}
        return {**where, "change": change}

    module = type("Toy", (), {"name": "toy.py", "mutants": range(7)})()
    record = {"modules": {}}
    found = [(entry("a"), None), (entry("b"), None), (entry("b", 9), None), (entry("c"), "t")]
    mutants.renew(record, module, found, 5)
    first, *others = record["modules"]["toy.py"]["survivors"]
    assert (first["change"], *(other["change"] for other in others)) == ("a", "b", "b")
    first["explanation"] = "b is 0"
    mutants.renew(record, module, [(entry("b", 9), "tests/test_toy.py::test_f")], None)
    assert record["modules"]["toy.py"] == {
        "mutants": 7,
        "tried": 4,
        "seed": 5,
        "survivors": [
            {**entry("a"), "killed_by": None, "explanation": "b is 0"},
            {**entry("b"), "killed_by": None, "explanation": ""},  # not its twin in the same line
            {**entry("b", 9), "killed_by": "tests/test_toy.py::test_f", "explanation": ""},
        ],
    }
