"""The time per token that the benchmark has measured grows for exact attention alone."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_token_after_a_long_context_is_20_times_as_fast_as_with_exact_attention():
    path = ROOT / "benchmarks" / "generation.py"
    spec = importlib.util.spec_from_file_location("generation", path)
    generation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generation)
    results = json.loads(generation.RESULTS.read_text(encoding="utf-8"))
    last = results["rows"][-1]["seconds_per_token"]
    assert results["rows"][-1]["context"] == 32768
    assert last["exact"] > 20 * max(last["favor, m = 128"], last["favor, m = 256"])
