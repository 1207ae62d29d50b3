"""What the documents show is true: Python runs, commands exist, links lead somewhere.

A block that cannot run here (it needs a download, or hours) comes after `<!-- not run: reason -->`.
The tutorials are notebooks, which `make docs` runs too.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pytest
from _pytest.mark import ParameterSet
from markdown_it import MarkdownIt
from markdown_it.token import Token

from performers.kernels import KERNELS
from performers.models import MECHANISMS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path for name in ("*.md", "docs/**/*.md", "examples/*.md") for path in sorted(ROOT.glob(name))
]
REPOSITORY_PATH = re.compile(r"(\.ci|benchmarks|docs|examples|experiments|src|tests)/[\w./-]+")
CELL = "{code-cell} python"  # of a notebook
SETTING = re.compile(r"\w+=\S*")  # as in OMP_NUM_THREADS=1 make test
SHELL_OPERATORS = {"&&", "||", ";", "|", "&", ">"}
NOT_RUN = re.compile(r"<!--\s*not run: \S.*-->", re.DOTALL)

# `performers` as its console script runs it, also where the script is not on the PATH.
PERFORMERS = [
    sys.executable,
    "-c",
    "import sys; sys.argv[0] = 'performers'\nfrom performers.cli import main; sys.exit(main())",
]


def tokens(document: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(document.read_text(encoding="utf-8"))


def python_blocks(document: Path) -> Iterator[Token]:
    """The blocks marked python and the cells, less those that say why they are not run."""
    before = None
    for token in tokens(document):
        excused = before is not None and NOT_RUN.search(before.content)
        if token.type == "fence" and token.info.strip() in {"python", CELL} and not excused:
            yield token
        before = token


def marked(document: Path) -> ParameterSet:
    """A document as a parameter. Notebooks take longer than other documents."""
    is_notebook = any(token.info.strip() == CELL for token in tokens(document))
    return pytest.param(document, marks=pytest.mark.slow if is_notebook else ())


def commands(document: Path) -> Iterator[list[str]]:
    """The commands in shell blocks, as argument lists; of a console block the lines after `$ `."""
    for token in tokens(document):
        if token.type != "fence" or token.info.strip() not in {"sh", "bash", "console"}:
            continue
        for line in token.content.replace("\\\n", " ").splitlines():
            if token.info.strip() == "console" and not line.startswith("$ "):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            ends = [i for i, word in enumerate(words) if word in SHELL_OPERATORS]
            for start, end in zip([-1, *ends], [*ends, len(words)], strict=True):
                command = words[start + 1 : end]
                while command and SETTING.fullmatch(command[0]):
                    command = command[1:]
                if command:
                    yield [Path(command[0]).name, *command[1:]]


def all_commands(program: str) -> list[tuple[str, ...]]:
    return sorted(
        {tuple(c[1:]) for document in DOCUMENTS for c in commands(document) if c[0] == program}
    )


def test_there_are_documents():
    assert ROOT / "DESIGN.md" in DOCUMENTS


@pytest.mark.parametrize("document", [*map(marked, DOCUMENTS)], ids=lambda path: path.name)
def test_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    with patch.dict(KERNELS), patch.dict(MECHANISMS):  # rows that a document adds are its own
        for block in python_blocks(document):
            # Blank lines in front give a traceback the line numbers of the document.
            source = "\n" * (block.map[0] + 1) + block.content
            exec(compile(source, str(document), "exec"), namespace)


@pytest.mark.parametrize("arguments", all_commands("make"), ids=" ".join)
def test_make_commands_exist(arguments):
    # Run under `make test`, this would inherit its flags.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", all_commands("performers"), ids=" ".join)
def test_performers_commands_and_options_exist(arguments):
    # --help makes it check the command and its options, and do nothing.
    done = subprocess.run([*PERFORMERS, *arguments, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_scripts_exist():
    words = {word for arguments in all_commands("python") for word in arguments}
    assert [word for word in words if word.endswith(".py") and not (ROOT / word).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_exist(document):
    """Relative links, images, and inline code that names a file of the repository by its path."""
    missing = []
    for token in tokens(document):
        for child in token.children or []:
            link = urlsplit(str(child.attrs.get("href") or child.attrs.get("src") or ""))
            if link.path and not link.scheme:
                missing += missing_path(document.parent / unquote(link.path))
            if child.type == "code_inline" and REPOSITORY_PATH.fullmatch(child.content):
                missing += missing_path(ROOT / child.content)
    assert missing == []


def missing_path(path: Path) -> list[str]:
    return [] if path.exists() else [str(path)]
