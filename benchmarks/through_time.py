"""Time per token and memory of a forward and backward pass over up to a million tokens, in chunks.

python benchmarks/through_time.py                      # writes through_time.json
python benchmarks/through_time.py --write-table        # puts its table into docs/distributed.md

The model is small, with random weights and tokens: neither time nor memory depends on them. Memory
is what the process took beyond what it had when the pass began, the tokens not included.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from performers import PerformerConfig, PerformerForCausalLM, backward_through_time
from performers.records import PeakMemory, describe_environment, markdown_table, write_block

RESULTS = Path(__file__).with_name("through_time.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "distributed.md"
BLOCK = "results:through-time"
CHUNK = 4096
# Lengths, and how many states are kept: as many as there are chunks, or fewer.
ROWS = [(65_536, 256), (1_048_576, 256), (1_048_576, 16)]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_projections": 16,
    "attention": "performer-positive",
}


def measure(length: int, kept_states: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = PerformerForCausalLM(PerformerConfig(**SIZES))
    tokens = torch.randint(SIZES["vocab_size"], (1, length))
    # What is allocated once in a process does not count.
    backward_through_time(model, tokens[:, : 2 * CHUNK], chunk_length=CHUNK)
    memory, start = PeakMemory(), time.process_time()
    loss = backward_through_time(model, tokens, chunk_length=CHUNK, kept_states=kept_states)
    seconds = time.process_time() - start
    row = {
        "length": length,
        "kept_states": kept_states,
        "seconds_per_token": seconds / length,
        "peak_bytes": memory.measure(),
        "loss": loss.item(),
    }
    print(row, flush=True)
    return row


def table(results: dict[str, Any]) -> str:
    lines = [["tokens", "kept states", "time per token", "memory of the pass"]]
    for row in results["rows"]:
        lines.append(
            [
                f"{row['length']:,}",
                str(row["kept_states"]),
                f"{1e6 * row['seconds_per_token']:.1f} µs",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            ]
        )
    sizes, where = results["model"], results["environment"]
    made = (
        f"{sizes['num_hidden_layers']} layers of width {sizes['hidden_size']}, m = "
        f"{sizes['num_projections']}, float32, chunks of {results['chunk_length']:,} tokens; CPU "
        f"time, {where['threads']} thread; {where['processor']}, torch "
        f"{where['packages']['torch']}. Memory is what the process took beyond what it had before."
    )
    return f"{markdown_table(lines)}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write-table", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_table:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_block(DOCUMENT, BLOCK, table(results))
        return
    torch.set_num_threads(1)
    results = {
        "model": SIZES,
        "chunk_length": CHUNK,
        "environment": describe_environment(),
        "rows": [measure(*row) for row in ROWS],
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
