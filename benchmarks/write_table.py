"""Write the speed of attention into README.md, from the numbers that the benchmark left.

performers benchmark --length 512 --length 1024 --length 2048 --length 4096 --repeats 3 \
    --output benchmarks/attention.json --force
python benchmarks/errors.py      # how far each setting is from exact attention
python benchmarks/write_table.py
python docs/draw_overview.py    # the README's first picture has the same numbers
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block
from performers.speed import wins_from

DOCUMENT = Path(__file__).parents[1] / "README.md"
BLOCK = "results:attention"
RESULTS = Path(__file__).with_name("attention.json")
ERRORS = Path(__file__).with_name("errors.json")

PARTS = ("forward", "forward_backward")
LENGTHS = (1024, 4096, 16384, 65536)
PEER = "performer-pytorch"


def table(results: dict[str, Any]) -> str:
    """A table of times for each dtype, with errors; models, memory and decoding; how all this was
    measured."""
    errors = json.loads(ERRORS.read_text(encoding="utf-8"))
    parts = [_times(results, dtype, errors) for dtype in results["plan"]["dtypes"]]
    parts += [_models(results), _memory(results), _decoding(results), _made(results, errors)]
    return "\n\n".join(part for part in parts if part)


def _times(results: dict[str, Any], dtype: str, errors: dict[str, Any]) -> str:
    """A row for each mode and setting; cells have the forward pass, then forward and backward."""
    of_dtype = [row for row in results["time"] if row["dtype"] == dtype]
    lengths = [length for length in results["plan"]["lengths"] if length in LENGTHS]
    lengths = lengths or results["plan"]["lengths"][-1:]
    longest = lengths[-1]
    header = [
        f"{dtype}: forward / forward and backward",
        "error of the output",
        *(f"relative to exact, L = {length:,}" for length in lengths),
        f"relative to {PEER}, L = {longest:,}",
        f"floor / time, L = {longest:,}",
        "faster than exact from L =",
    ]
    lines = []
    for causal in (False, True):
        rows = {row["length"]: row for row in of_dtype if row["causal"] == causal}
        last = rows[longest]
        times = [_cell(rows[length], "exact", _milliseconds) for length in lengths]
        mode = _mode(last)
        lines.append([f"{mode}, exact", "0", *times, "", _floor(last, "exact"), ""])
        for name, setting in results["settings"].items():
            ratios = [_ratios(rows[length], name, "exact") for length in lengths]
            wins = [wins_from(results["time"], name, dtype, causal, part) for part in PARTS]
            lines.append(
                [
                    f"{mode}, {_words(name, setting)}",
                    _error(errors, mode, name),
                    *ratios,
                    _ratios(last, name, setting["peers"][0]),
                    _floor(last, name),
                    " / ".join(wins),
                ]
            )
        rest = [""] * (len(header) - 2)
        lines.append([f"{mode}, averaging the values", _error(errors, mode, "averaging"), *rest])
    return markdown_table([header, *lines])


def _words(name: str, setting: dict[str, Any]) -> str:
    sizes = {"m": setting["num_projections"], "w": setting["window_size"]}
    return f"{name}: " + ", ".join(f"{size} = {value}" for size, value in sizes.items() if value)


def _error(errors: dict[str, Any], mode: str, name: str) -> str:
    found = errors["errors"][mode].get(name)
    return "" if found is None else f"{found:.2f}"


def _mode(row: dict[str, Any]) -> str:
    return "causal" if row["causal"] else "bidirectional"


def _cell(row: dict[str, Any], name: str, format: Callable[[float, str], str]) -> str:
    """Of one mechanism, for both parts. What could not be measured says why."""
    cells = []
    for part in PARTS:
        measured = row["seconds"][name][part]
        known = not isinstance(measured, str)
        cells.append(format(measured["median"], part) if known else measured)
    return " / ".join(cells)


def _milliseconds(seconds: float, part: str) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def _ratios(row: dict[str, Any], name: str, other: str) -> str:
    theirs = row["seconds"].get(other)
    if theirs is None:
        return ""

    def ratio(seconds: float, part: str) -> str:
        measured = theirs[part]
        return measured if isinstance(measured, str) else _ratio(seconds, measured["median"])

    return _cell(row, name, ratio)


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2g}" if ours < 0.095 * theirs else f"{ours / theirs:.2f}"


def _floor(row: dict[str, Any], name: str) -> str:
    return _cell(
        row, name, lambda seconds, part: f"{row['floor_seconds'][name][part] / seconds:.0%}"
    )


def _models(results: dict[str, Any]) -> str:
    """Times of training steps in units of the identity's."""
    rows = results["models"]
    if not rows:
        return ""
    names = [name for name in rows[0]["seconds"] if name != "identity"]
    lines = [["training step of a model, relative to one without attention", *names]]
    for row in rows:
        floor = row["seconds"]["identity"]["forward_backward"]["median"]
        both = [row["seconds"][name]["forward_backward"] for name in names]
        cells = [x if isinstance(x, str) else f"{x['median'] / floor:.2f}" for x in both]
        kind = "causal" if row["causal"] else "masked"
        lines.append([f"{kind} language model, L = {row['length']:,}", *cells])
    return markdown_table(lines)


def _memory(results: dict[str, Any]) -> str:
    """A row for each mechanism, a column for each mode and length."""
    rows = results["memory"]
    if not rows:
        return ""
    header = ["peak memory of a training step, float32"]
    lines = [
        header + [f"{_mode(row)}, L = {row['length']:,}" for row in rows],
        *(
            [name, *(_mebibytes(row["peak_bytes"].get(name, "")) for row in rows)]
            for name in dict.fromkeys(name for row in rows for name in row["peak_bytes"])
        ),
    ]
    return markdown_table(lines)


def _decoding(results: dict[str, Any]) -> str:
    """Time of a token and size of what is kept, a row for each context."""
    rows = results["decoding"]
    if not rows:
        return ""
    names = list(rows[0]["seconds"])
    lines = [["decoding one token, float32: time, size of state or cache", *names]]
    for row in rows:
        line = [f"after {row['context']:,} tokens"]
        for name in names:
            seconds, size = row["seconds"][name], _mebibytes(row["bytes"][name], ".1f")
            known = not isinstance(seconds, str)
            line.append(f"{seconds['median'] * 1e3:.2f} ms, {size}" if known else seconds)
        lines.append(line)
    return markdown_table(lines)


def _mebibytes(size: int | str, digits: str = ".0f") -> str:
    return size if isinstance(size, str) else f"{size / 2**20:,{digits}} MiB"


def _made(results: dict[str, Any], errors: dict[str, Any]) -> str:
    plan, environment = results["plan"], results["environment"]
    model, near = results["model"]["shared"], results["model"]["attention"]["near-field"]
    return (
        "Made by `performers benchmark`: CPU time, medians of "
        f"{plan['repeats']} repeats in turn; batch {plan['batch']}, {plan['heads']} heads "
        f"of dim {plan['dim']}, {environment['threads']} thread; models: "
        f"{model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads, m = {model['num_projections']}, "
        f"near-field m = {near['num_projections']}, w = {near['window_size']}; "
        f"{environment['processor']}, {results['capability']}, "
        f"torch {environment['packages']['torch']}, {PEER} {results['peers'][PEER]}. Errors: of "
        f"{errors['model']} on {errors['length']} tokens, by `python benchmarks/errors.py`."
    )


if __name__ == "__main__":
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    write_block(DOCUMENT, BLOCK, table(results))
