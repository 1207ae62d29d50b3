"""Ranks say what they are about to do before they do it, so that none waits for another in vain."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from performers.distributed.collectives import on_all_ranks, rank_in, size_of

__all__ = ["agree", "report"]

# An attribute of errors that all ranks know of, because they raise, too.
SHARED = "is_shared_by_ranks"

Words = Mapping[str, str]


def agree(
    group: dist.ProcessGroup, describe: Callable[[], tuple[Mapping[str, object], int]]
) -> list[int]:
    """Raise on every rank unless all ranks describe the same, and none of them raises in doing so.

    `describe` returns what must be equal on all ranks, by name, and a number that need not be. The
    result is these numbers, by rank.

    Cost: three numbers per rank, whatever is described; descriptions travel only if they differ.
    """
    try:
        said, number = describe()
    except (TypeError, ValueError) as error:
        report(group, error)
        raise
    words = {name: repr(what) for name, what in said.items()}
    headers = _headers(group, True, zlib.crc32(repr(words).encode()), number)
    if bool(headers[:, 0].all()) and bool((headers[:, 1] == headers[0, 1]).all()):
        return headers[:, 2].tolist()
    disagreement = ValueError(_difference(_told(group, words, ""), rank_in(group)))
    setattr(disagreement, SHARED, True)
    raise disagreement


def report(group: dist.ProcessGroup, error: BaseException) -> None:
    """Let the next `agree` of the other ranks raise, for this rank cannot go on. Nothing happens if
    they know of this error.
    """
    if getattr(error, SHARED, False):
        return
    setattr(error, SHARED, True)
    _headers(group, False, 0, 0)
    _told(group, {}, f"{type(error).__name__}: {error}")


def _headers(group: dist.ProcessGroup, *own: int) -> torch.Tensor:
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return on_all_ranks(torch.tensor(own, device=device), group)


def _told(group: dist.ProcessGroup, words: Words, error: str) -> list[tuple[Words, str]]:
    everything: list[tuple[Words, str]] = [({}, "")] * size_of(group)
    dist.all_gather_object(everything, (words, error), group)
    return everything


def _difference(everything: list[tuple[Words, str]], own: int) -> str:
    """Which rank cannot go on, or else what differs first."""
    for rank, (_, error) in enumerate(everything):
        if error:
            return f"rank {rank} of the group cannot go on, so that no rank can. It says: {error}"
    first = everything[0][0]
    for rank, (words, _) in enumerate(everything):
        for name in {**first, **words}:
            here, there = first.get(name), words.get(name)
            if here != there:
                return (
                    f"all ranks of a group must have the same {name}: rank 0 has {here}, rank "
                    f"{rank} has {there} (this is rank {own}). Give all ranks the same, apart "
                    "from their pieces of the sequence."
                )
    raise AssertionError("checksums differ only where descriptions do")
