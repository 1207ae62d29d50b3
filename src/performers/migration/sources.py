"""The tensors of a checkpoint by dotted names, from a file or a tree; nothing in it is executed."""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["describe_source", "read_tensors"]

# What the readers of torch, numpy and safetensors raise for files with wrong bytes in them.
DAMAGED = (
    SafetensorError,
    ValueError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def read_tensors(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors in float32, by names such as "a.b.c"; "/" in a name counts as a dot.

    `source`: a file of torch.save, of safetensors (.safetensors) or of numpy.savez (.npz), or a
    mapping of tensors or arrays, which may be nested. What is no array is left out.

    Raises FileNotFoundError, and ValueError for a file that cannot be read, or that holds code.
    """
    tree = source if isinstance(source, Mapping) else _read_file(Path(source))
    return {name.replace("/", "."): tensor for name, tensor in _leaves(tree)}


def describe_source(source: str | Path | Mapping[str, Any]) -> dict[str, str]:
    """Which file it was: its name, and the SHA-256 of its bytes."""
    if isinstance(source, Mapping):
        return {}
    path, digest = Path(source), hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return {"file": path.name, "sha256": digest.hexdigest()}


def _read_file(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be a file of torch.save, safetensors or numpy.savez, and there is none."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} must hold tensors alone, and holds other objects, which could run code when "
            "they are loaded, or is no file of torch.save. Where you trust it, load it there and "
            "save the tensors: torch.save(model.state_dict(), path)."
        ) from error
    except DAMAGED as error:
        raise ValueError(
            f"{path} cannot be read: {error}. It must be a whole file of torch.save, safetensors "
            "(.safetensors) or numpy.savez (.npz), without objects."
        ) from error
    if not isinstance(tree, Mapping):
        raise ValueError(
            f"{path} must hold a state dict, got {type(tree).__name__}. Save model.state_dict()."
        )
    return tree


def _leaves(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, f"{above}{name}.")
        elif isinstance(leaf, Tensor):
            yield f"{above}{name}", leaf.detach().float()
        elif hasattr(leaf, "__array__") and np.asarray(leaf).dtype.kind not in "OSUMm":
            yield f"{above}{name}", torch.from_numpy(np.array(leaf, dtype=np.float32))
