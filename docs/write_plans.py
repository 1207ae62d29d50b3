"""Runs the commands of docs/planning.md and writes what they print under them."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from performers.cli.app import app

DOCUMENT = Path(__file__).parent / "planning.md"
BLOCK = re.compile(r"(?<=```console\n)\$ performers (plan .*)\n(?:[^`]*)(?=```)")


def with_outputs(document: str) -> str:
    """The document with the output of each of its commands after it."""

    def shown(block: re.Match[str]) -> str:
        done = CliRunner().invoke(app, block[1].split())
        assert done.exit_code == 0, done.output
        return f"$ performers {block[1]}\n{done.stdout}"

    return BLOCK.sub(shown, document)


if __name__ == "__main__":
    DOCUMENT.write_text(with_outputs(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
