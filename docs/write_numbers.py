"""Write the measured numbers into docs/explained.md, from the JSON of the experiment.

python docs/write_numbers.py
"""

import json
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block

DOCUMENT = Path(__file__).with_name("explained.md")
BLOCK = "results:sharp-minilm"
RESULTS = DOCUMENT.parents[1] / "experiments" / "sharp-minilm" / "paper.json"

LENGTH, NUM_PROJECTIONS = 256, 256
CHOICES = {
    "`SoftmaxFeatures`": "FAVOR+",
    "`SharpFeatures`": "sharp",
    "`SharpFeatures`, `query_ratio=2`": "sharp, longer queries",
    "`SoftmaxFeatures`, window 32": "FAVOR+, window 32",
    "`SharpFeatures`, window 32": "sharp, window 32",
    "`SharpFeatures`, window 64": "sharp, window 64",
}


def table(record: dict[str, Any]) -> str:
    """The error of each choice in both directions, and how it was measured."""
    column = record["config"]["num_projections"].index(NUM_PROJECTIONS)
    cases = {c["mode"]: c for c in record["results"]["cases"] if c["length"] == LENGTH}
    rows = [["averaging the values", *(case["uniform"] for case in cases.values())]]
    for title, name in CHOICES.items():
        rows.append([title, *(case["errors"][name][column] for case in cases.values())])
    header = [f"relative error, length {LENGTH}, m = {NUM_PROJECTIONS}", *cases]
    lines = [header]
    lines += [[title, *(f"{point['mean']:.2f}" for point in points)] for title, *points in rows]
    environment = record["environment"]
    made = (
        f"Made by `performers reproduce sharp-minilm --scale {record['scale']}` on "
        f"{environment['processor']} ({environment['threads']} of {environment['cores']} cores), "
        f"torch {environment['packages']['torch']}: queries, keys and values of all-MiniLM-L6-v2 "
        "reading prose, mean over layers and heads."
    )
    return f"{markdown_table(lines)}\n\n{made}"


if __name__ == "__main__":
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_block(DOCUMENT, BLOCK, table(record))
