"""Write the speed of attention on another processor into docs/processors.md.

performers benchmark --dtype float32 --length 512 --length 1024 --length 2048 --length 4096 \
    --output benchmarks/attention-avx512.json
python benchmarks/write_processor.py
"""

import json
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block
from performers.speed import wins_from

DOCUMENT = Path(__file__).parents[1] / "docs" / "processors.md"
BLOCK = "results:processor"
RESULTS = Path(__file__).with_name("attention-avx512.json")

PARTS = ("forward", "forward_backward")
LENGTHS = (1024, 4096)
DTYPE = "float32"


def table(results: dict[str, Any]) -> str:
    """A row for each mode and setting, relative to exact attention; models; how it was measured."""
    lines = [
        [
            "float32: forward / forward and backward",
            *(f"relative to exact, L = {length:,}" for length in LENGTHS),
            "faster than exact from L =",
        ]
    ]
    for causal in (False, True):
        rows = {row["length"]: row["seconds"] for row in results["time"] if row["causal"] == causal}
        mode = "causal" if causal else "bidirectional"
        lines.append(
            [
                f"{mode}, exact",
                *(
                    " / ".join(f"{1e3 * _of(rows[n], 'exact', part):.0f} ms" for part in PARTS)
                    for n in LENGTHS
                ),
                "",
            ]
        )
        for name, setting in results["settings"].items():
            sizes = {"m": setting["num_projections"], "w": setting["window_size"]}
            words = ", ".join(f"{size} = {value}" for size, value in sizes.items() if value)
            wins = [wins_from(results["time"], name, DTYPE, causal, part) for part in PARTS]
            ratios = [" / ".join(_ratio(rows[n], name, part) for part in PARTS) for n in LENGTHS]
            lines.append([f"{mode}, {name}: {words}", *ratios, " / ".join(wins)])
    return f"{markdown_table(lines)}\n\n{_models(results)}\n\n{_made(results)}"


def _of(row: dict[str, Any], name: str, part: str) -> float:
    return float(row[name][part]["median"])


def _ratio(row: dict[str, Any], name: str, part: str) -> str:
    return f"{_of(row, name, part) / _of(row, 'exact', part):.2f}"


def _models(results: dict[str, Any]) -> str:
    """Times of training steps in units of the identity's."""
    kinds = {False: "masked", True: "causal"}
    parts = []
    for row in results["models"]:
        steps = {name: _of(row["seconds"], name, "forward_backward") for name in row["seconds"]}
        least = steps.pop("identity")
        cells = ", ".join(f"{name} {seconds / least:.2f}" for name, seconds in steps.items())
        parts.append(f"of a {kinds[row['causal']]} language model, L = {row['length']:,}: {cells}")
    return f"A training step in units of one without attention, {'; '.join(parts)}."


def _made(results: dict[str, Any]) -> str:
    plan, environment = results["plan"], results["environment"]
    return (
        f"Made by `performers benchmark`: CPU time, medians of {plan['repeats']} repeats in turn; "
        f"batch {plan['batch']}, {plan['heads']} heads of dim {plan['dim']}, "
        f"{environment['threads']} thread; {environment['processor']}, {results['capability']}, "
        f"torch {environment['packages']['torch']}."
    )


if __name__ == "__main__":
    write_block(DOCUMENT, BLOCK, table(json.loads(RESULTS.read_text(encoding="utf-8"))))
