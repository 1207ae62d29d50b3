"""Write the speed of attention into README.md, from the numbers that the benchmark left.

performers benchmark --repeats 3 --output benchmarks/attention.json --force
python benchmarks/write_table.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("attention.json")
BLOCK = re.compile(r"(<!-- results:attention -->\n).*?(<!-- /results:attention -->)", re.DOTALL)


PEER = "performer-pytorch"


def table(results: dict[str, Any]) -> str:
    """Time of the Performer as a part of its alternatives', memory, decoding, and how measured."""
    plan, environment = results["plan"], results["environment"]
    made = (
        "Made by `performers benchmark`: CPU time, medians of "
        f"{plan['repeats']} repeats in turn; batch {plan['batch']}, {plan['heads']} heads "
        f"of dim {plan['dim']}, m = {plan['num_projections']}, {environment['threads']} thread; "
        f"{environment['processor']}, {results['capability']}, "
        f"torch {environment['packages']['torch']}, performer-pytorch {results['peers'][PEER]}."
    )
    return "\n\n".join([_times(results["time"]), _memory(results), _decoding(results), made])


def _times(rows: list[dict[str, Any]]) -> str:
    header = ["", "length", "forward", "÷ exact", f"÷ {PEER}"]
    header += ["forward and backward", "÷ exact", f"÷ {PEER}"]
    lines = []
    for row in rows:
        if row["length"] not in LENGTHS:
            continue
        mode = "causal" if row["causal"] else "bidirectional"
        line = [f"{mode}, {row['dtype']}", f"{row['length']:,}"]
        for part in ("forward", "forward_backward"):
            ours = row["seconds"]["performer"][part]["median"]
            line.append(f"{ours * 1e3:,.0f} ms")
            for name in ("exact", PEER):
                theirs = row["seconds"][name][part]
                line.append(theirs if isinstance(theirs, str) else _ratio(ours, theirs["median"]))
        lines.append(line)
    return _markdown([header, *lines])


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2g}" if ours < 0.095 * theirs else f"{ours / theirs:.2f}"


LENGTHS = (1024, 4096, 16384, 65536)


def _memory(results: dict[str, Any]) -> str:
    names = ["identity", "performer", "exact", PEER]
    header = ["peak memory of a training step, float32", "length", *names]
    lines = [
        [
            "causal" if row["causal"] else "bidirectional",
            f"{row['length']:,}",
            *(
                size if isinstance(size, str) else f"{size / 2**20:,.0f} MiB"
                for size in (row["peak_bytes"][name] for name in names)
            ),
        ]
        for row in results["memory"]
    ]
    return _markdown([header, *lines])


def _decoding(results: dict[str, Any]) -> str:
    header = ["decoding one token, float32", "performer", "its state", "exact", "its cache"]
    lines = []
    for row in results["decoding"]:
        line = [f"after {row['context']:,} tokens"]
        for name in ("performer", "exact"):
            seconds, size = row["seconds"][name], row["bytes"][name]
            known = not isinstance(seconds, str)
            line.append(f"{seconds['median'] * 1e3:.2f} ms" if known else seconds)
            line.append(size if isinstance(size, str) else f"{size / 2**20:,.1f} MiB")
        lines.append(line)
    return _markdown([header, *lines])


def _markdown(rows: list[list[str]]) -> str:
    rows = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


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
