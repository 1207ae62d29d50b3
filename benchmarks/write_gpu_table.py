"""Write the speed of attention on a GPU into README.md, from the numbers in gpu.json.

python benchmarks/write_gpu_table.py
"""

import json
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block

DOCUMENT = Path(__file__).parents[1] / "README.md"
BLOCK = "results:gpu"
RESULTS = Path(__file__).with_name("gpu.json")

PARTS = ("forward", "forward_backward")


def table(results: dict[str, Any]) -> str:
    """Two tables: calls from Python by length, and what of a call is work of the GPU."""
    return "\n\n".join([_calls(results), _kernels(results), _made(results)])


def _calls(results: dict[str, Any]) -> str:
    rows = results["benchmark"]["milliseconds"]
    names = [name for name in rows[next(iter(rows))] if name != "exact"]
    lines = [["bidirectional, bfloat16: forward / forward and backward", "exact", *names]]
    for length, of_length in rows.items():
        exact = of_length["exact"]
        times = " / ".join(f"{exact[part]:,.1f} ms" for part in PARTS)
        ratios = [
            " / ".join(_ratio(of_length[name][part], exact[part]) for part in PARTS)
            for name in names
        ]
        lines.append([f"L = {int(length):,}, relative to exact", times, *ratios])
    return markdown_table(lines)


def _kernels(results: dict[str, Any]) -> str:
    calls = results["kernels"]["calls"]
    header = "batch 8, L = 4,096: forward / forward and backward"
    lines = [[header, "called from Python", "GPU alone"]]
    for call in calls:
        walls, alone = (
            " / ".join(f"{call[part][kind]:.2f} ms" if kind in call[part] else "" for part in PARTS)
            for kind in ("wall", "gpu")
        )
        alone = alone if "gpu" in call["forward"] else ""
        mode = "causal" if call["causal"] else "bidirectional"
        lines.append([f"{mode}, {call['setting']}", walls, alone])
    return markdown_table(lines)


def _made(results: dict[str, Any]) -> str:
    plan, environment = results["benchmark"], results["environment"]
    return (
        f"Made on one {results['card']}, torch {environment['torch']}, Triton "
        f"{environment['triton']}; {plan['heads']} heads of dim {plan['dim']}, batch "
        f"{plan['batch']} where nothing else is said, m = {plan['num_projections']}, near fields "
        "m = 64. How: `note` in benchmarks/gpu.json."
    )


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2g}" if ours < 0.095 * theirs else f"{ours / theirs:.2f}"


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_block(DOCUMENT, BLOCK, table(results))
