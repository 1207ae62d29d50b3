"""What the benchmark of states over ranks has counted is what the documents say of it."""

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_rank_sends_a_state_to_each_other_rank_or_one_in_each_step_of_a_scan():
    path = ROOT / "benchmarks" / "prefix_merge.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    for row in results["rows"]:
        ranks = row["ranks"]
        gathered = [sent / results["state_bytes"] for sent in row["all_gather"]["bytes_written"]]
        assert gathered == pytest.approx([ranks - 1] * ranks, rel=0.01)
        scanned = max(row["scan"]["bytes_written"]) / results["state_bytes"]
        assert scanned == pytest.approx(math.ceil(math.log2(ranks)), rel=0.01)
