"""No file of code is longer than one can keep in mind."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 450

# Kernels are as long as the arithmetic of a pass, forward and backward.
KERNELS = (
    "src/performers/backends/kernel_tiles.py",
    "src/performers/backends/scan.py",
    "src/performers/backends/triton/",
)


def too_long(root):
    """The files under `root`, by their paths in it, that are no kernels and too long."""
    return [
        name
        for folder in ("src", "experiments", "examples", "benchmarks", "docs", "tools")
        for path in sorted((root / folder).rglob("*.py"))
        if not (name := path.relative_to(root).as_posix()).startswith(KERNELS)
        and len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    ]


def test_no_file_but_kernels_is_too_long():
    assert too_long(ROOT) == []


@pytest.mark.parametrize("name", ["src/performers/nn/long.py", "experiments/figure-2/long.py"])
def test_a_file_of_one_line_more_is_found(name, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("pass\n" * MOST_LINES)
    assert too_long(tmp_path) == []
    (tmp_path / name).write_text("pass\n" * (MOST_LINES + 1))
    assert too_long(tmp_path) == [name]
