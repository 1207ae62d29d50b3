"""The README's table of speed is what the code makes of the committed numbers, and nothing else."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_speed_in_the_readme_is_the_committed_benchmark():
    script = ROOT / "benchmarks" / "write_table.py"
    specification = importlib.util.spec_from_file_location("write_speed_table", script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    assert module.with_table(readme, results) == readme
    longest = max(row["length"] for row in results["time"])
    assert f"{longest:,}" in readme
