"""Write the measured numbers into docs/conversion.md, from the JSON of the experiment.

python docs/write_long_contexts.py
"""

import json
import math
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block

DOCUMENT = Path(__file__).with_name("conversion.md")
BLOCK = "results:long-context"
RESULTS = DOCUMENT.parents[1] / "experiments" / "long-context" / "reduced.json"


def table(record: dict[str, Any]) -> str:
    """What each way to attend makes of a long text, and how it was measured."""
    config, results = record["config"], record["results"]
    book = results["read"][0]
    (exact, *_), edges = book["positions"], config["edges"]
    rows = [
        [
            f"{config['length']:,} tokens",
            f"perplexity ÷ exact, behind {edges[-2]:,}",
            "a token",
            "cache",
        ]
    ]
    for title, positions in book["positions"].items():
        continued = book["continued"][title]
        rows.append(
            [
                title,
                f"{math.exp(positions[-1]['loss'] - book['positions'][exact][-1]['loss']):.2f}",
                f"{continued['seconds_per_token']['median'] * 1e3:.0f} ms",
                f"{continued['bytes_in_the_end'] / 2**20:.1f} MiB",
            ]
        )
    environment = record["environment"]
    made = (
        f"Made by `performers reproduce long-context --scale {record['scale']}` on "
        f"{environment['processor']} ({environment['threads']} of {environment['cores']} cores, "
        f"CPU time), torch {environment['packages']['torch']}: SmolLM2-135M, blocks of "
        f"{config['window']}, four sinks, from the beginning of {config['books'][0]}."
    )
    return f"{markdown_table(rows)}\n\n{made}"


if __name__ == "__main__":
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_block(DOCUMENT, BLOCK, table(record))
