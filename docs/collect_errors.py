"""Write docs/errors.md: what the package says to what it cannot use, collected from its source.

python docs/collect_errors.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).with_name("errors.md")
PACKAGE = DOCUMENT.parents[1] / "src" / "performers"

HEAD = """\
# Errors

What performers refuses, and in which words. A message says what must hold, what came, and what to
do. To find one, search this page for some of its words that are no numbers, names or paths of
yours: these are `…` here.

A command prints such a message as one line, `error: …`, and ends with exit code 2; one that was
interrupted, by Ctrl-C or by a scheduler, ends with 130. From Python the message is that of the
exception that stands before it. An `AssertionError`, or an error of another library with a
traceback through performers, is a fault of performers: please report it.

`python docs/collect_errors.py` writes this page from the source.
"""

# An `AssertionError` speaks to who changes the package.
KINDS = (
    "ValueError", "TypeError", "KeyError", "IndexError", "FileNotFoundError", "FileExistsError",
    "IsADirectoryError", "ImportError", "ModuleNotFoundError", "AttributeError", "RuntimeError",
    "NotImplementedError", "FloatingPointError", "UnsavedError",
)  # fmt: skip


class Message(NamedTuple):
    """An error that a function raises or makes, with `…` for what the call fills in."""

    function: str
    kind: str
    words: str


def messages(source: str) -> Iterator[Message]:
    """The errors of a module, in its order."""
    return _of(ast.parse(source), ())


def _of(node: ast.AST, names: tuple[str, ...]) -> Iterator[Message]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = (*names, node.name)
    made = {ast.Raise: "exc", ast.Return: "value"}.get(type(node))
    error = getattr(node, made) if made else None
    if isinstance(error, ast.Call) and isinstance(error.func, ast.Name) and error.args:
        words = _words(error.args[0]).strip()
        if error.func.id in KINDS and words.strip("…"):
            yield Message(".".join(names), error.func.id, " ".join(words.split()))
    for child in ast.iter_child_nodes(node):
        yield from _of(child, names)


def _words(node: ast.AST) -> str:
    """The text of an expression, as far as it stands in the source."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_words(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _words(node.left) + _words(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # text.rstrip()
        return _words(node.func.value)
    return "…"


def page() -> str:
    """The whole document: a section for each module that refuses anything."""
    sections = [HEAD]
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        found = list(messages(source))
        if not found:
            continue
        name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
        about = (ast.get_docstring(ast.parse(source)) or "").partition("\n\n")[0]
        sections.append(f"## {name.removesuffix('.__init__')}\n\n{about}\n")
        for function in dict.fromkeys(message.function for message in found):
            lines = [f"{kind}: {words}" for owner, kind, words in found if owner == function]
            where = f"`{function}`" if function else "On import"
            sections.append(f"{where}:\n\n```text\n" + "\n".join(lines) + "\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    DOCUMENT.write_text(page(), encoding="utf-8")
