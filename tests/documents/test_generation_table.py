"""The table of time per token is what the benchmark has measured."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_generation_is_written_from_the_benchmark():
    path = ROOT / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("generation", path)
    generation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generation)
    results = json.loads(generation.RESULTS.read_text(encoding="utf-8"))
    assert generation.table(results) in generation.DOCUMENT.read_text(encoding="utf-8")
    last = results["rows"][-1]["seconds_per_token"]
    assert results["rows"][-1]["context"] == 32768
    assert last["exact"] > 20 * max(last["favor, m = 128"], last["favor, m = 256"])
