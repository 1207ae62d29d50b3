"""Packed sequences: several side by side in one row, each of which attends to itself alone.

segment_ids   3 3 3 3 │ 5 5 │ 4 4 4         a segment begins where the number changes
              ▔▔▔▔▔▔▔   ▔▔▔   ▔▔▔▔▔         one call of attention each, as if it were alone
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.backends.derivatives import is_transformed
from performers.checks import check_segment_ids

__all__ = ["attend_by_segment", "restarts"]

Output = Float[Tensor, "batch heads length value_dim"]

# Up to so many segments get a call each, and so the same bits as alone. A product of matrices may
# be summed in another order where it is one of a batch, so no batch could promise that. Beyond,
# calls alone would take seconds.
MOST_CALLS = 256


@torch.compiler.disable(
    reason="how packed sequences are cut depends on the numbers in segment_ids, which a graph "
    "cannot hold: compile without fullgraph=True, or pass a padded batch and a mask"
)
def attend_by_segment(
    attend: Callable[..., Tensor],
    segment_ids: Int[Tensor, "batch length"],
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    key_padding_mask: Bool[Tensor, "batch length"] | None,
) -> Output:
    """Attention of each segment to itself: `attend` takes query, key, value and key_padding_mask=
    of some segments of one length, as a batch.

    With at most 256 segments each has a call of its own, and outputs and gradients have the bits
    that they have for the sequence alone. With more, segments of equal length share a call, and
    there are at most √(2 · batch · length) calls, because lengths that differ add up; equality then
    is one up to rounding.

    Raises ValueError or TypeError for numbers that do not fit.
    """
    if torch.compiler.is_exporting():
        raise ValueError(
            "how packed sequences are cut depends on the numbers in segment_ids, which an exported "
            "graph cannot hold. Export attention with a padded batch and key_padding_mask=."
        )
    check_segment_ids(segment_ids, query, key)
    batch, length = segment_ids.shape
    if batch * length == 0:
        return attend(query, key, value, key_padding_mask=key_padding_mask)
    lengths = _lengths(segment_ids)
    # Not slices: the gradient of each would be as long as all segments together.
    rows = [x.transpose(0, 1).flatten(1, 2).split(lengths, dim=1) for x in (query, key, value)]
    masks = None if key_padding_mask is None else key_padding_mask.flatten().split(lengths)
    outputs: list[Tensor] = [query] * len(lengths)
    for together in _calls(lengths):
        inputs = [torch.stack([row[i] for i in together]) for row in rows]
        mask = None if masks is None else torch.stack([masks[i] for i in together])
        out = attend(*inputs, key_padding_mask=mask)
        for i, output in zip(together, out.unbind(), strict=True):
            outputs[i] = output
    return torch.cat(outputs, dim=1).unflatten(1, (batch, length)).transpose(0, 1)


def restarts(position_ids: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """The segments of positions that count on by one within each: 0 1 2 0 1 ─► 0 0 0 1 1."""
    steps = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1)
    return (steps != 1).cumsum(dim=1)


def _lengths(segment_ids: Tensor) -> list[int]:
    """How long each segment is, row after row."""
    begins = torch.ones_like(segment_ids, dtype=torch.bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = begins.flatten().nonzero().flatten()
    lengths = start.diff(append=start.new_tensor([begins.numel()]))
    # torch 2.8 has no tolist() of what a transform wraps.
    return [x.item() for x in lengths] if is_transformed() else lengths.tolist()


def _calls(lengths: list[int]) -> list[list[int]]:
    """The numbers of the segments that share a call: one in each, or all of one length."""
    if len(lengths) <= MOST_CALLS:
        return [[i] for i in range(len(lengths))]
    together: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        together.setdefault(length, []).append(i)
    return list(together.values())
