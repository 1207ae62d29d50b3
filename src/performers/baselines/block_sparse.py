"""Softmax attention in which a block of queries sees a few blocks of keys: the core of sparse ones.

    query blocks    0   1   2   3   4                of block 3
                    │   │   │   ├───┴────┐           keys are gathered: blocks 0, 2, 3, 4
    key blocks      0   1   2   3   4    ▼
                    ■ ─ ─ ─ ■ ─ ■ ─ ■  one softmax over those that the pattern lets it see

A matrix of all pairs, or a mask of all pairs, never exists. What one softmax cannot gather at once
is computed in parts (`Part`), which are then put under one normalizer.

On CUDA devices PyTorch's flex_attention reads the blocks where they lie. Elsewhere it has no
backward pass, and blocks are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from performers.backends.derivatives import needs_formula
from performers.backends.slots import Slots

__all__ = [
    "Part",
    "Sees",
    "attend_to_blocks",
    "combined",
    "nearest_blocks",
    "part",
    "part_of_scores",
    "real",
    "real_keys",
    "rows_at",
    "sees_all",
    "with_global_rows",
]

# (sequence, key head, position of a query, position of a key), which broadcast, to whether the
# query sees the key. It is what flex_attention asks of a mask.
Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The tiles of flex_attention, by whose size those of its kernels can be divided.
TILE = 128

LOG2_E = math.log2(math.e)


@cache
def compiled_flex_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    """flex_attention as one kernel. Uncompiled it is a matrix of all pairs, so that it must not
    fall back to that where PyTorch has compiled too many forms of it.
    """
    return torch.compile(flex_attention, fullgraph=True)


class Part(NamedTuple):
    """A softmax over some of the keys of each row, before it is normalized.

        total  = Σ_j 2^(s_j − frame),    values = Σ_j 2^(s_j − frame) v_j

    The frame, the largest score of a row, keeps all terms in range and cancels in the end, so it is
    not differentiated. Of a row that sees no key, total and values are 0. Scores are those of the
    softmax times log₂ e: on a CPU 2^−∞ is as quick as any power, and exp(−∞) takes ten times that.
    """

    values: Float[Tensor, "*batch rows value_dim"]
    total: Float[Tensor, "*batch rows 1"]
    frame: Float[Tensor, "*batch rows 1"]

    def map(self, function: Callable[[Tensor], Tensor]) -> Part:
        """The same with a function applied to each tensor, such as a change of their order."""
        return Part(*map(function, self))

    def average(self) -> Float[Tensor, "*batch rows value_dim"]:
        """The values by the weights of the softmax; 0 for a row that sees no key."""
        return self.values / torch.where(self.total == 0, 1.0, self.total)

    def merged(self, dim: int) -> Part:
        """The sets of keys along a dimension, which goes, under one normalizer."""
        frame = self.frame.amax(dim=dim, keepdim=True)
        share = (self.frame - frame).exp2()
        values, total = (share * self.values).sum(dim), (share * self.total).sum(dim)
        return Part(values, total, frame.squeeze(dim))

    def merge(self, other: Part) -> Part:
        """Both sets of keys under one normalizer."""
        frame = torch.maximum(self.frame, other.frame)
        mine, theirs = (self.frame - frame).exp2(), (other.frame - frame).exp2()
        return Part(
            mine * self.values + theirs * other.values,
            mine * self.total + theirs * other.total,
            frame,
        )


def part(
    query: Float[Tensor, "*#batch rows dim"],
    key: Float[Tensor, "*#batch columns dim"],
    value: Float[Tensor, "*#batch columns value_dim"],
    visible: Bool[Tensor, "*#batch #rows #columns"],
) -> Part:
    """The softmax of QKᵀ/√dim over the visible columns, in float32 at least."""
    accurate = torch.promote_types(query.dtype, torch.float32)
    # Queries are scaled, which are fewer numbers than scores.
    query = query.to(accurate) * (LOG2_E / math.sqrt(query.shape[-1]))
    return _part_in_base_2(query @ key.to(accurate).mT, value, visible)


def part_of_scores(
    scores: Float[Tensor, "*#batch rows columns"],
    value: Float[Tensor, "*#batch columns value_dim"],
    visible: Bool[Tensor, "*#batch #rows #columns"],
) -> Part:
    """The softmax of these scores over the visible columns, in their dtype."""
    return _part_in_base_2(LOG2_E * scores, value, visible)


def _part_in_base_2(scores: Tensor, value: Tensor, visible: Tensor) -> Part:
    # 0 or −∞, added: several times as quick as masked_fill, and its gradient is there already. A
    # score that is infinite or NaN is not hidden by it, as such a value is not by the weight 0.
    scores = scores + (1 - visible.to(scores.dtype).reciprocal())
    lowest = torch.finfo(scores.dtype).min
    if scores.shape[-1] == 0:
        frame = scores.new_full((*scores.shape[:-1], 1), lowest)
    else:
        frame = scores.detach().amax(dim=-1, keepdim=True).clamp(min=lowest)
    weights = (scores - frame).exp2()
    return Part(weights @ value.to(scores.dtype), weights.sum(dim=-1, keepdim=True), frame)


def combined(parts: Sequence[Part]) -> Float[Tensor, "*batch rows value_dim"]:
    """softmax(…) V over the keys of all parts together; 0 for a row that sees none."""
    return reduce(Part.merge, parts).average()


def nearest_blocks(
    num_blocks: int, before: int, after: int, device: torch.device
) -> Int[Tensor, "1 1 num_blocks near"]:
    """For each block the numbers of the blocks next to it, itself included; −1 beyond the ends."""
    own = torch.arange(num_blocks, device=device)[:, None]
    near = own + torch.arange(-before, after + 1, device=device)
    return near.masked_fill((near < 0) | (near >= num_blocks), -1)[None, None]


def sees_all(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """The pattern of all pairs, which leaves the choice to the blocks that are listed."""
    return j >= 0


def real(slots: Slots, sees: Sees, is_causal: bool) -> Sees:
    """A pattern between real tokens alone, in which no causal query sees a later key."""

    def sees_real(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = sees(sequence, head, i, j) & _is_there(sequence, j, slots)
        return visible & (j <= i) if is_causal else visible

    return sees_real


def attend_to_blocks(
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    blocks: Int[Tensor, "#batch #key_heads num_blocks neighbors"],
    block_size: int,
    sees: Sees,
) -> Part:
    """The part of each query over the keys that it sees in the blocks listed for its own block.

    `blocks`: numbers of key blocks, −1 for none; one that is listed twice counts once. Rows that do
    not fill the last block are padded inside, at positions from the length on.

    Cost: O(length · neighbors · block_size · dim).
    """
    length = query.shape[3]
    missing = blocks.shape[2] * block_size - length
    query, key, value = (F.pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    attend = _by_flex_attention if _has_flex_attention(query, value, block_size) else _by_gathering
    rows = attend(query, key, value, blocks, block_size, sees)
    return rows.map(lambda x: x[..., :length, :])


def _by_gathering(
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    blocks: Int[Tensor, "#batch #key_heads num_blocks neighbors"],
    block_size: int,
    sees: Sees,
) -> Part:
    num_blocks = blocks.shape[2]
    query, key, value = (x.unflatten(-2, (num_blocks, block_size)) for x in (query, key, value))
    is_again = (blocks.unsqueeze(-1) == blocks.unsqueeze(-2)).tril(-1).any(dim=-1)
    blocks = blocks.masked_fill(is_again, -1)
    batch, heads = key.shape[:2]
    sequence = torch.arange(batch, device=key.device)[:, None, None, None]
    head = torch.arange(heads, device=key.device)[None, :, None, None]
    # [batch, key_heads, num_blocks, neighbors · block_size, …]
    listed = blocks.clamp(min=0).flatten(2)
    key, value = (
        rows_at(x.flatten(3), listed).unflatten(2, blocks.shape[2:]).unflatten(-1, x.shape[3:])
        for x in (key, value)
    )
    key, value = (x.flatten(3, 4) for x in (key, value))

    within = torch.arange(block_size, device=key.device)
    starts = torch.arange(num_blocks, device=key.device)[:, None] * block_size
    i = (starts + within).unsqueeze(-1)
    j = blocks.clamp(min=0).unsqueeze(-1) * block_size + within
    is_listed = (blocks >= 0).unsqueeze(-1).expand_as(j)
    j, is_listed = (x.flatten(-2).unsqueeze(-2) for x in (j, is_listed))
    visible = is_listed & sees(sequence.unsqueeze(-1), head.unsqueeze(-1), i, j)
    rows = part(query, key.unsqueeze(2), value.unsqueeze(2), visible.unsqueeze(2))
    return rows.map(lambda x: x.flatten(3, 4))


def rows_at(
    x: Float[Tensor, "*batch length dim"], index: Int[Tensor, "*#batch number"]
) -> Float[Tensor, "*batch number dim"]:
    """The rows of x with these numbers: whole ones are copied, which `gather` cannot know of."""
    index = index.expand(*x.shape[:-2], -1)
    sequence = torch.arange(math.prod(x.shape[:-2]), device=x.device).view(*x.shape[:-2], 1)
    in_all = (sequence * x.shape[-2] + index).flatten()
    return x.flatten(0, -2).index_select(0, in_all).unflatten(0, index.shape)


def _has_flex_attention(query: Tensor, value: Tensor, block_size: int) -> bool:
    """Whether flex_attention computes this and its gradients: see its checks of inputs."""
    return (
        query.device.type == "cuda"
        and query.dtype == value.dtype != torch.float64
        and min(query.shape[-1], value.shape[-1]) >= 16
        and query.numel() > 0
        and (TILE % block_size == 0 or block_size % TILE == 0)
        and not needs_formula()
    )


def _by_flex_attention(
    query: Float[Tensor, "batch key_heads group length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    blocks: Int[Tensor, "#batch #key_heads num_blocks neighbors"],
    block_size: int,
    sees: Sees,
) -> Part:
    """The same, without copies of keys. The table of blocks takes (length / block_size)² bytes."""
    group, num_blocks = query.shape[2], blocks.shape[2]
    is_listed = torch.zeros(
        *blocks.shape[:3], num_blocks + 1, dtype=torch.bool, device=blocks.device
    )
    # What is not listed, −1, goes to a column behind the last.
    is_listed = is_listed.scatter(-1, blocks % (num_blocks + 1), True)[..., :num_blocks]
    of_each = is_listed.expand(*key.shape[:2], -1, -1)

    def sees_listed(sequence: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        key_head = head // group
        listed = of_each[sequence, key_head, i // block_size, j // block_size]
        return listed & sees(sequence, key_head, i, j)

    tiles = _tiles(is_listed, block_size)
    if tiles.shape[1] > 1:
        tiles = tiles.repeat_interleave(group, dim=1)
    length = query.shape[3]
    mask = BlockMask.from_kv_blocks(
        tiles.sum(dim=-1, dtype=torch.int32),
        tiles.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=TILE,
        mask_mod=sees_listed,
        seq_lengths=(length, length),
    )
    average, log_total = compiled_flex_attention()(
        query.flatten(1, 2), key, value, block_mask=mask, enable_gqa=group > 1, return_lse=True
    )
    log_total = LOG2_E * log_total
    frame = log_total.detach().clamp(min=torch.finfo(log_total.dtype).min)
    total = (log_total - frame).exp2().unsqueeze(-1)
    rows = Part(average.to(total.dtype) * total, total, frame.unsqueeze(-1))
    return rows.map(lambda x: x.unflatten(1, (-1, group)))


def _tiles(
    is_listed: Bool[Tensor, "batch heads num_blocks num_blocks"], block_size: int
) -> Bool[Tensor, "batch heads num_tiles num_tiles"]:
    """Which tiles of queries have a listed block in which tiles of keys."""
    if block_size >= TILE:
        times = block_size // TILE
        return is_listed.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    ratio = TILE // block_size
    missing = -is_listed.shape[-1] % ratio
    padded = F.pad(is_listed, (0, missing, 0, missing))
    return padded.unflatten(3, (-1, ratio)).unflatten(2, (-1, ratio)).any(dim=5).any(dim=3)


def with_global_rows(
    slots: Slots,
    rows: Float[Tensor, "batch key_heads group length value_dim"],
    start: Int[Tensor, "#batch 1"],
    number: int,
) -> Float[Tensor, "batch key_heads group length value_dim"]:
    """The rows, where the `number` of them from `start` on see every key instead.

    Cost: O(number · length · dim).
    """
    length = rows.shape[3]
    if length == 0:
        return rows
    within = torch.arange(number, device=rows.device)
    query = slots.query.take_along_dim(_along((start + within).clamp(max=length - 1)), dim=3)
    position = torch.arange(length, device=rows.device)
    key, value = slots.key.unsqueeze(2), slots.value.unsqueeze(2)
    of_all = combined([part(query, key, value, real_keys(slots))])
    offset = position - start
    spread = of_all.take_along_dim(_along(offset.clamp(0, number - 1)), dim=3)
    return torch.where(_along((offset >= 0) & (offset < number)), spread, rows)


def _along(x: Tensor) -> Tensor:
    """[batch, length] as it stands beside [batch, key_heads, group, length, dim]."""
    return x[:, None, None, :, None]


def _is_there(
    sequence: Int[Tensor, "*#rest"], j: Int[Tensor, "*#rest"], slots: Slots
) -> Bool[Tensor, ...]:
    """Whether positions of keys are those of real tokens."""
    if slots.is_real is None:
        return j < slots.key.shape[2]
    # All parts of the index are tensors: torch 2.8 cannot trace a pattern otherwise.
    return j < slots.count[sequence, torch.zeros_like(sequence)]


def real_keys(slots: Slots) -> Bool[Tensor, "#batch 1 1 1 length"]:
    """Which keys are those of real tokens."""
    sequence = torch.arange(len(slots.key), device=slots.key.device).view(-1, 1, 1, 1, 1)
    position = torch.arange(slots.key.shape[2], device=slots.key.device)
    return _is_there(sequence, position.expand(1, 1, 1, 1, -1), slots)
