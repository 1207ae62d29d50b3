"""How Sphinx makes the site: `make docs`. Its pages are the Markdown files of the repository."""

import itertools
import re
from typing import Any

from sphinx.application import Sphinx

from performers import __version__

project = "performers"
author = "the performers authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb"}
root_doc = "docs/index"
include_patterns = [
    "docs/**", "experiments/*/README.md", "examples/README.md", "*.md", "benchmarks/NOTES.md",
    "tests/MUTANTS.md",
]  # fmt: skip
myst_heading_anchors = 4

# The tutorials are notebooks, which run when the site is built and fail it where they fail.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 180  # seconds for a cell
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"performers {version}"


def _escaped(prose: str) -> str:
    """Prose in reStructuredText: `names` are code, and nothing else has a meaning."""
    parts = re.split(r"`([^`]+)`", prose)
    for index, part in enumerate(parts):
        parts[index] = f"``{part}``" if index % 2 else re.sub(r"([\\*_|`])", r"\\\1", part)
    return "\\ ".join(parts) if len(parts) > 1 else parts[0]


def as_written(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: paragraphs, lists, and formulas or tables, which are indented."""
    found: list[str] = []
    in_list = False
    for is_indented, run in itertools.groupby(lines, lambda line: line.startswith(" ")):
        block = list(run)
        if is_indented and not in_list:
            found += ["", "::", "", *(f"    {line}" for line in block), ""]
        else:
            found += [_escaped(line) for line in block]
        if not is_indented:
            last = [line for line in block if line]
            in_list = bool(last) and last[-1].startswith("- ")
    lines[:] = found


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_written)
