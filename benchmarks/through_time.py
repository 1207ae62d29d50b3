"""Time and memory of one forward and backward pass over up to a million tokens, chunk by chunk.

python benchmarks/through_time.py            # some two minutes; writes through_time.json
python benchmarks/through_time.py --write    # its table and its figure, for docs/distributed.md

A causal Performer, `backward_through_time`, random tokens. Memory is what the process took beyond
model and tokens. Time is that of the processor.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from performers import PerformerConfig, PerformerForCausalLM, backward_through_time
from performers.records import PeakMemory, describe_environment, markdown_table, write_block

RESULTS = Path(__file__).with_name("through_time.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "distributed.md"
FIGURE = DOCUMENT.with_name("through-time.svg")
BLOCK = "results:through-time"

SHORT, LONG = 2**16, 2**20
CHUNK, ALL = 4096, 256  # as many states as the million has chunks
# Measured at SHORT: the length of a chunk, and for short chunks the number of states that are kept.
CHUNKS = (256, 512, 1024, 2048, 4096, 8192, 16384)
KEPT_OF, KEPT = 256, (64, 16, 4, 2)
MODEL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "attention": "performer-positive",
    "num_projections": 16,
    "max_position_embeddings": LONG,
    "hidden_dropout_prob": 0.0,
}


def measure(length: int, chunk_length: int, kept_states: int) -> dict[str, Any]:
    """One pass, after a short one that loads what torch needs once."""
    torch.manual_seed(0)
    model = PerformerForCausalLM(PerformerConfig(**MODEL))
    tokens = torch.randint(MODEL["vocab_size"], (1, length))
    backward_through_time(model, tokens[:, : 2 * chunk_length], chunk_length=chunk_length)
    model.zero_grad()
    memory, start = PeakMemory(), time.process_time()
    backward_through_time(model, tokens, chunk_length=chunk_length, kept_states=kept_states)
    row = {
        "tokens": length,
        "chunk_length": chunk_length,
        "kept_states": kept_states,
        "seconds": time.process_time() - start,
        "peak_bytes": memory.measure(),
    }
    print(row, flush=True)
    return row


def microseconds(row: dict[str, Any]) -> float:
    """Of a token."""
    return 1e6 * row["seconds"] / row["tokens"]


def mebibytes(row: dict[str, Any]) -> float:
    return row["peak_bytes"] / 2**20


def table(results: dict[str, Any]) -> str:
    """The million tokens beside fewer, and what they cost more."""
    lines = [["tokens", "peak memory", "time of a token"]]
    for row in results["lengths"]:
        lines.append(
            [
                f"{row['tokens']:,}",
                f"{mebibytes(row):.1f} MiB",
                f"{microseconds(row):.1f} µs",
            ]
        )
    short, long = results["lengths"][0], results["lengths"][-1]
    environment = results["environment"]
    made = (
        f"Forward and back in chunks of {CHUNK:,} tokens, with a state kept for each: "
        f"{mebibytes(long) / mebibytes(short):.2f} × the memory and "
        f"{microseconds(long) / microseconds(short):.2f} × the time of a token. A Performer of "
        f"{MODEL['num_hidden_layers']} layer, hidden size {MODEL['hidden_size']}, "
        f"{MODEL['num_attention_heads']} heads, m = {MODEL['num_projections']}, in float32; "
        f"{environment['processor']}, {environment['threads']} thread, CPU time, torch "
        f"{environment['packages']['torch']}; written by `python benchmarks/through_time.py`."
    )
    return f"{markdown_table(lines)}\n\n{made}"


def draw(results: dict[str, Any]) -> None:
    """Time of a token against memory: by the length of a chunk, and by the states that are kept."""
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.subplots()
    all_kept = next(row for row in results["chunks"] if row["chunk_length"] == KEPT_OF)
    for rows, color, label, word in (
        (results["chunks"], "#1f5fbf", "chunks of …, all states kept", "chunk_length"),
        (
            [all_kept, *results["kept"]],
            "#d1662b",
            f"chunks of {KEPT_OF}, … states kept",
            "kept_states",
        ),
    ):
        axes.plot(
            [*map(mebibytes, rows)], [*map(microseconds, rows)], "o-", color=color, label=label
        )
        for row in rows if word == "chunk_length" else rows[1:]:
            place = mebibytes(row), microseconds(row)
            axes.annotate(
                f"{row[word]:,}",
                place,
                xytext=(6, 4) if rows is results["chunks"] else (-14, -4),
                textcoords="offset points",
                fontsize=8,
                color=color,
            )
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("peak memory, MiB")
    axes.set_ylabel("CPU time of a token, µs")
    axes.set_title(f"Memory for time, {SHORT:,} tokens", loc="left", fontsize=11)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not arguments.write:
        torch.set_num_threads(1)
        results = {
            "lengths": [measure(length, CHUNK, ALL) for length in (SHORT, LONG)],
            "chunks": [measure(SHORT, chunk, ALL) for chunk in CHUNKS],
            "kept": [measure(SHORT, KEPT_OF, kept) for kept in KEPT],
            "model": MODEL,
            "environment": describe_environment(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    draw(results)
    write_block(DOCUMENT, BLOCK, table(results))


if __name__ == "__main__":
    main()
