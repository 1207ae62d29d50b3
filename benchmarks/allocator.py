"""What attention takes on a CPU whose C library keeps the memory of tensors, or gives it back.

python benchmarks/allocator.py    # minutes on Linux; writes its JSON and docs/processors.md

glibc gives free memory at the end of its heap back to the system, and takes tensors of 32 MiB and
more from it one by one: every page of theirs is then made and cleared anew. Two variables, read
when a process begins, make it keep what it has. Processes with and without them take turns; in
each, all settings take turns as well.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers import favor_attention
from performers.records import describe_environment, markdown_table, write_block
from performers.speed.settings import SETTINGS, Layer
from performers.speed.timing import interleaved
from performers.typing import FeatureMap

RESULTS = Path(__file__).with_name("allocator.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "processors.md"
BLOCK = "results:allocator"

KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
NAMES = ("plain", "relu", "near-field")
LENGTHS = (4096, 32768)
HEADS, DIM, PROJECTIONS = 8, 64, 256
ROUNDS, PROCESSES = 5, 3


def measure() -> dict[str, float]:
    """Seconds forward and backward by setting and length, medians of rounds, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = torch.device("cpu")
    features = {}
    for name in NAMES:
        number = SETTINGS[name].num_projections or PROJECTIONS
        features[name] = SETTINGS[name].features(Layer(DIM, number, HEADS, False, device))
    found = {}
    for length in LENGTHS:
        tensors = [torch.randn(1, HEADS, length, DIM, requires_grad=True) for _ in range(3)]
        gradient = torch.randn(1, HEADS, length, DIM)
        calls = {
            name: partial(step, phi, SETTINGS[name].window_size, tensors, gradient)
            for name, phi in features.items()
        }
        for name, measured in interleaved(calls, ROUNDS, device).items():
            assert isinstance(measured, dict), "a layer fits into memory"
            found[f"{name}, {length}"] = measured["median"]
    return found


def step(phi: FeatureMap, window_size: int | None, tensors: list[Tensor], gradient: Tensor) -> None:
    favor_attention(*tensors, phi, window_size=window_size).backward(gradient)
    for x in tensors:
        x.grad = None


def run() -> dict[str, Any]:
    """Both ways, medians over processes."""
    ways = {"given back": {}, "kept": KEPT}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for number in range(PROCESSES):
        for way, variables in ways.items():
            print(f"process {number + 1} of {PROCESSES}, memory {way}", file=sys.stderr)
            command = [sys.executable, __file__, "--one"]
            out = subprocess.run(
                command, env={**os.environ, **variables}, check=True, stdout=subprocess.PIPE
            ).stdout
            found[way].append(json.loads(out))
    seconds = {
        way: {name: statistics.median(one[name] for one in of_way) for name in of_way[0]}
        for way, of_way in found.items()
    }
    capability = torch.backends.cpu.get_cpu_capability()
    return {"seconds": seconds, "capability": capability, "environment": describe_environment()}


def table(results: dict[str, Any]) -> str:
    before, after = (results["seconds"][way] for way in ("given back", "kept"))
    header = ["forward and backward", *(f"L = {length:,}" for length in LENGTHS)]
    rows = []
    for name in NAMES:
        keys = [f"{name}, {length}" for length in LENGTHS]
        rows.append(
            [name, *(f"{1e3 * before[key]:,.0f} → {1e3 * after[key]:,.0f} ms" for key in keys)]
        )
    environment = results["environment"]
    made = (
        f"Medians of {ROUNDS} repeats in turn and of {PROCESSES} processes, CPU time, float32, "
        f"batch 1, {HEADS} heads of dim {DIM}, bidirectional, 1 thread; "
        f"{environment['processor']}, {results['capability']}, torch "
        f"{environment['packages']['torch']}; written by `python benchmarks/allocator.py`."
    )
    return f"{markdown_table([header, *rows])}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", action="store_true", help="measure in this process, as it began")
    parser.add_argument("--write", action="store_true", help="only write the document again")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure()))
        return
    if not arguments.write:
        RESULTS.write_text(json.dumps(run(), indent=1) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(json.loads(RESULTS.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
