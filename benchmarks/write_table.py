"""Write the speed of attention into README.md, from the numbers that the benchmark left.

python benchmarks/attention.py --lengths 1024 4096 --repeats 3
python benchmarks/write_table.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("attention.json")
BLOCK = re.compile(r"(<!-- results:attention -->\n).*?(<!-- /results:attention -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """CPU time of the Performer as a part of its alternatives', and how it was measured."""
    header = ["float32", "length", "forward", "÷ exact", "÷ performer-pytorch"]
    header += ["forward and backward", "÷ exact", "÷ performer-pytorch"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row in results["rows"]:
        if row["dtype"] != "float32":
            continue
        line = ["causal" if row["causal"] else "bidirectional", f"{row['length']:,}"]
        for part in ("forward", "forward_backward"):
            medians = {name: times[part]["median"] for name, times in row["seconds"].items()}
            ours = medians["performer"]
            peer = medians.get("performer-pytorch")
            line += [f"{ours * 1e3:.0f} ms", f"{ours / medians['exact']:.2f}"]
            line.append("" if peer is None else f"{ours / peer:.2f}")
        lines.append(line)
    made = (
        "Made by `python benchmarks/attention.py`: CPU time, medians of "
        f"{results['repeats']} repeats in turn; batch {results['batch']}, {results['heads']} heads "
        f"of dim {results['dim']}, m = {results['num_projections']}, {results['threads']} thread; "
        f"{results['machine']}, {results['capability']}, torch {results['torch']}."
    )
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", made])


def with_table(document: str, results: dict[str, Any]) -> str:
    """The document with a fresh table between its `results:attention` comments."""
    text, count = BLOCK.subn(lambda found: f"{found[1]}{table(results)}\n{found[2]}", document)
    if count != 1:
        raise ValueError(
            "the document must have one block between <!-- results:attention --> and "
            f"<!-- /results:attention -->, found {count}."
        )
    return text


def main() -> None:
    readme = ROOT / "README.md"
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
