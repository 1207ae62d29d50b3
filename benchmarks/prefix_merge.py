"""Time and bytes of the states before each rank, as causal attention over ranks needs them.

python benchmarks/prefix_merge.py    # some minutes; writes its JSON and docs/distributed.md

Both ways exchange states of 8 heads, m = 256, d = 64, one sequence, forward, by gloo:

    all_gather   every rank gets all states, and merges those before it: the library's own way
    scan         ⌈log₂ n⌉ steps; in each a rank hands what it has merged to one further on

They take turns, and are compared before they are timed. Processes of one machine share its cores
and its memory, so this measures copies, merges and waiting, not a network. Bytes are those that a
process writes (Linux), with what gloo adds to a message.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from performers import SoftmaxFeatures, favor_attention
from performers.distributed.collectives import rank_in, size_of
from performers.distributed.states import merged_where
from performers.records import describe_environment, markdown_table, write_block
from performers.state import LinearState

RESULTS = Path(__file__).with_name("prefix_merge.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "distributed.md"
BLOCK = "results:prefix-merge"

RANKS = (2, 3, 4, 8)
HEADS, PROJECTIONS, DIM, LENGTH = 8, 256, 64, 256  # the length leaves no trace in a state
STATE_BYTES = 4 * HEADS * PROJECTIONS * (DIM + 2)
WARM = 3
ROUNDS = 8  # all numbers of ranks have a part of each, so that other work slows all alike

Merge = Callable[[LinearState, dist.ProcessGroup], LinearState]


def gathered(state: LinearState, group: dist.ProcessGroup) -> LinearState:
    """The state of the keys of all ranks before this one."""
    return merged_where(state, [rank < rank_in(group) for rank in range(size_of(group))], group)


def scanned(state: LinearState, group: dist.ProcessGroup) -> LinearState:
    """The same, by a scan. After the step of distance s a rank has merged what 2s ranks hold:

        own, 0 ─► 1 ─► 2 ─► 3     s = 1: 0 | 0–1 | 1–2 | 2–3
             0 ──────► 2          s = 2: 0 | 0–1 | 0–2 | 0–3
                  1 ──────► 3

    `before` is the same without the rank's own.
    """
    rank, ranks = rank_in(group), size_of(group)
    everywhere = torch.ones(len(state.values), 1, 1, dtype=torch.bool)
    before, through = state.emptied(everywhere), state
    for distance in _distances(ranks):
        waiting, received = [], None
        if rank + distance < ranks:
            waiting.append(dist.isend(_packed(through), rank + distance, group))
        if rank >= distance:
            received = torch.empty_like(_packed(state))
            waiting.append(dist.irecv(received, rank - distance, group))
        for work in filter(None, waiting):
            work.wait()
        if received is not None:
            earlier = _unpacked(received, state)
            before = earlier.merge(before)
            if rank + 2 * distance < ranks:  # else nobody asks for it any more
                through = earlier.merge(through)
    return before


WAYS: dict[str, Merge] = {"all_gather": gathered, "scan": scanned}


def _distances(ranks: int) -> Iterator[int]:
    return (2**step for step in range(math.ceil(math.log2(ranks))))


def _packed(state: LinearState) -> Tensor:
    parts = [state.log_scale.unsqueeze(-1), state.normalizer.unsqueeze(-1), state.values]
    return torch.cat(parts, dim=-1)


def _unpacked(packed: Tensor, like: LinearState) -> LinearState:
    log_scale, normalizer, values = packed.split([1, 1, like.values.shape[-1]], dim=-1)
    return replace(
        like, log_scale=log_scale.squeeze(-1), normalizer=normalizer.squeeze(-1), values=values
    )


def _written_bytes() -> int:
    """What this process has written so far, to files and to other processes."""
    counts = Path("/proc/self/io").read_text(encoding="utf-8")
    return int(counts.split("wchar: ")[1].split()[0])


def own_state(rank: int) -> LinearState:
    phi = SoftmaxFeatures(DIM, PROJECTIONS, seed=0)
    draw = torch.Generator().manual_seed(1 + rank)
    key, value = torch.randn(2, 1, HEADS, LENGTH, DIM, generator=draw).unbind()
    _, state = favor_attention(key[:, :, :0], key, value, phi, return_state=True)
    return state


class Turn(NamedTuple):
    """One merge as one rank sees it; the clock is that of the machine."""

    begin: float
    end: float
    cpu_seconds: float
    written: int


@torch.no_grad()
def measure(repeats: int) -> dict[str, list[Turn]]:
    """The turns of each way."""
    assert dist.group.WORLD is not None, "ranks are there before they measure"
    group = dist.group.WORLD
    state = own_state(rank_in(group))
    one, other = (merge(state, group) for merge in WAYS.values())
    for part, wanted in one.parts().items():
        torch.testing.assert_close(other.parts()[part], wanted, rtol=1e-5, atol=1e-5)
    turns: dict[str, list[Turn]] = {way: [] for way in WAYS}
    for _ in range(WARM + repeats):
        for way, merge in WAYS.items():
            dist.barrier(group)
            written, used, begin = _written_bytes(), time.process_time(), time.perf_counter()
            merge(state, group)
            end, used = time.perf_counter(), time.process_time() - used
            turns[way].append(Turn(begin, end, used, _written_bytes() - written))
    return {way: measured[WARM:] for way, measured in turns.items()}


def _run(pipe: Connection, store: str, rank: int, ranks: int, work: Callable[[], Any]) -> None:
    torch.set_num_threads(1)  # threads of the parent do not exist here
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    pipe.send(work())
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What `work()` returns on each of so many processes."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (theirs, f"file://{folder}/store", rank, ranks, work)
            processes.append(context.Process(target=_run, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()  # so that a rank which fails ends the wait for its answer
            pipes.append(ours)
        answers = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return answers


def summed_up(ranks: int, answers: list[dict[str, list[Turn]]]) -> dict[str, Any]:
    """A merge lasts from the first rank that begins to the last that ends."""
    row: dict[str, Any] = {"ranks": ranks}
    seconds: dict[str, list[float]] = {}
    for way in WAYS:
        of_all = list(zip(*(answer[way] for answer in answers), strict=True))
        seconds[way] = [max(x.end for x in turn) - min(x.begin for x in turn) for turn in of_all]
        row[way] = {
            "seconds": statistics.median(seconds[way]),
            "quartiles": statistics.quantiles(seconds[way], n=4)[::2],
            "cpu_seconds": statistics.median(sum(x.cpu_seconds for x in turn) for turn in of_all),
            "bytes_written": [
                statistics.median(x.written for x in answer[way]) for answer in answers
            ],
        }
    pairs = zip(*(seconds[way] for way in ("scan", "all_gather")), strict=True)
    row["scan_was_faster"] = sum(scan < gather for scan, gather in pairs)
    print(json.dumps(row), flush=True)
    return row


def _leaders(leads: dict[int, float]) -> str:
    """Who is ahead on how many ranks: the scan by a positive lead."""
    found: dict[str, list[str]] = {}
    for ranks, lead in leads.items():
        leader = "the scan" if lead > 0 else "`all_gather`" if lead < 0 else "neither"
        found.setdefault(leader, []).append(str(ranks))
    return "; ".join(f"{leader} on {', '.join(ranks)} ranks" for leader, ranks in found.items())


def _said(results: dict[str, Any]) -> str:
    """Which way won, in time where coins would be off by 3 standard errors to win as many turns."""
    turns = results["repeats"]
    wins = {row["ranks"]: row["scan_was_faster"] - turns / 2 for row in results["rows"]}
    clear = {ranks: lead if abs(lead) > 1.5 * turns**0.5 else 0 for ranks, lead in wins.items()}
    cpu = {
        row["ranks"]: row["all_gather"]["cpu_seconds"] - row["scan"]["cpu_seconds"]
        for row in results["rows"]
    }
    return (
        f"Faster in more turns than chance gives: {_leaders(clear)}. Less CPU time: "
        f"{_leaders(cpu)}."
    )


def table(results: dict[str, Any]) -> str:
    """Time and bytes of both ways, and which was faster where."""
    header = ["ranks"]
    for what in ("time", "CPU time of all", "states that a rank sends"):
        header += [f"{what}: `all_gather`", "scan"]
    lines = [header]
    for row in results["rows"]:
        ways = [row[way] for way in WAYS]
        lines.append(
            [
                str(row["ranks"]),
                *(f"{1e3 * way['seconds']:.1f} ms" for way in ways),
                *(f"{1e3 * way['cpu_seconds']:.1f} ms" for way in ways),
                *(f"{max(way['bytes_written']) / results['state_bytes']:.2f}" for way in ways),
            ]
        )
    environment = results["environment"]
    made = (
        f"{_said(results)} Forward, medians of {results['repeats']} repeats in turn. Time goes "
        "from the first rank that begins to the last that ends; states are those of the rank that "
        f"sends most, {results['state_bytes'] / 1e6:.2f} MB each: batch 1, {HEADS} heads, "
        f"m = {PROJECTIONS}, d = {DIM}, float32. gloo, all processes on {environment['cores']} "
        f"cores of {environment['processor']}, which had other work too, torch "
        f"{environment['packages']['torch']}; written by `python benchmarks/prefix_merge.py`."
    )
    return f"{markdown_table(lines)}\n\n{made}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50, help="in each round")
    repeats: int = parser.parse_args().repeats
    answers: dict[int, list[dict[str, list[Turn]]]] = {
        ranks: [{way: [] for way in WAYS} for _ in range(ranks)] for ranks in RANKS
    }
    for _ in range(ROUNDS):
        for ranks, of_ranks in answers.items():
            for so_far, new in zip(
                of_ranks, on_ranks(ranks, partial(measure, repeats)), strict=True
            ):
                for way in WAYS:
                    so_far[way] += new[way]
    results = {
        "rows": [summed_up(ranks, answers[ranks]) for ranks in RANKS],
        "repeats": ROUNDS * repeats,
        "state_bytes": STATE_BYTES,
        "environment": describe_environment(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(results))


if __name__ == "__main__":
    main()
