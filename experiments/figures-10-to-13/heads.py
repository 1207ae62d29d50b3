"""What kind of pattern a head shows in one protein, and matrices as text that JSON can hold."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

# Neighbors of a residue; and as many columns as are compared with what even attention gives them.
NEAR, COLUMNS = 3, 3
# A head shows a pattern where it gives at least so many times what even attention would give.
TIMES = 3.0


def described(
    matrices: Float[Tensor, "layers heads residues residues"],
) -> list[dict[str, Any]]:
    """Of each head: layer and head, counted from 1, and its kind.

    "local": each residue attends to its neighbors, the `near` share of all attention being to
    residues at most 3 away. "vertical": all attend to the same residues, the `top` share being to
    the 3 that receive most. Of both, what exceeds even attention by more; "global" if neither does
    so 3 times.
    """
    length = matrices.shape[-1]
    position = torch.arange(length)
    is_near = (position[:, None] - position).abs() <= NEAR
    total = matrices.sum((-2, -1))
    near = (matrices * is_near).sum((-2, -1)) / total
    top = matrices.sum(-2).topk(min(COLUMNS, length), dim=-1).values.sum(-1) / total
    found = []
    for layer, head in np.ndindex(*total.shape):
        times = {
            "local": float(near[layer, head] / is_near.float().mean()),
            "vertical": float(top[layer, head]) * length / COLUMNS,
        }
        kind = max(times, key=times.__getitem__)
        found.append(
            {
                "layer": layer + 1,
                "head": head + 1,
                "kind": kind if times[kind] >= TIMES else "global",
                "times": round(max(times.values()), 3),
                "near": round(float(near[layer, head]), 4),
                "top": round(float(top[layer, head]), 4),
            }
        )
    return found


def packed(matrices: Float[Tensor, "layers heads residues residues"]) -> dict[str, Any]:
    """The matrices as bytes, 255 √A, compressed: a picture shows no more."""
    levels = (255 * matrices.clamp(0, 1).sqrt()).round().to(torch.uint8).numpy()
    text = base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode("ascii")
    return {"shape": list(levels.shape), "levels": text}


def unpacked(saved: dict[str, Any]) -> np.ndarray:
    """√A of each entry, (layers, heads, residues, residues)."""
    levels = np.frombuffer(zlib.decompress(base64.b64decode(saved["levels"])), np.uint8)
    return levels.reshape(saved["shape"]) / 255.0
