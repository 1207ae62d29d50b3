"""Google's FAVOR for JAX (google-research/performer), in the Flax models of google-research.

A tree of arrays, nested or with names such as "a/b/c". The names of its modules are counted, and
differ between versions of Flax; what a module is can be seen from what it holds:

    {embedding}                            token embeddings
    {pos_embedding}                        a table of positions, (1, length, hidden)
    {…: {query, key, value, out}, …}       a block; its norms and dense layers in their order
    {scale, bias}, {kernel, bias}          the last norm, the head
    projection_matrix                      ω, of all layers or of one attention layer

The tree has no ω of its own: that code draws ω anew in each call, unless redraw_features=False.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import Tensor

from performers.kernels import KERNELS
from performers.migration.library import OMEGA, Layout, Library, Renamed
from performers.nn.dialect import Dialect

__all__ = ["GOOGLE_JAX"]

STABILIZER = 1e-6  # `numerical_stabilizer` of make_fast_softmax_attention

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
HELD_OMEGA = "projection_matrix"


def rename(tensors: Mapping[str, Tensor]) -> Renamed:
    """See `Library.rename`."""
    found = Renamed()
    if "query.kernel" in tensors:
        _attention("", tensors, "", found)
        return found
    modules = _children(tensors)
    shared, blocks = None, []
    for name, parts in modules.items():
        names = set(parts)
        if name == HELD_OMEGA:
            shared = parts[""]
        elif any(part.endswith(".query.kernel") for part in names):
            blocks.append(name)
        elif names == {"embedding"}:
            found.tensors["embed_tokens.weight"] = parts["embedding"]
        elif names == {"pos_embedding"}:
            found.tensors["positions.embedding.weight"] = parts["pos_embedding"].squeeze(0)
        elif names == {"scale", "bias"}:
            _norm(parts, "norm", found)
        elif names in ({"kernel", "bias"}, {"kernel"}) and "lm_head.weight" not in found.tensors:
            _dense(parts, "lm_head", found)
        else:
            found.unknown += _full(name, names)
    for layer, name in enumerate(_in_order(blocks)):
        _block(name, modules[name], f"layers.{layer}.", found)
        if shared is not None:
            found.tensors.setdefault(f"layers.{layer}.attention.{OMEGA}", shared)
    if "embed_tokens.weight" in found.tensors and "positions.embedding.weight" not in found.tensors:
        raise ValueError(
            "this tree embeds tokens and has no table of positions: sines and cosines were added "
            "that are not parameters. Add the array that was added as "
            "{'positions': {'pos_embedding': array}}, of shape (1, length, hidden)."
        )
    return found


def _block(name: str, parts: Mapping[str, Tensor], ours: str, found: Renamed) -> None:
    modules = _children(parts)
    norms = [child for child in modules if set(modules[child]) == {"scale", "bias"}]
    attentions = [child for child in modules if "query.kernel" in modules[child]]
    dense = {
        child: inner
        for child in modules
        if len(inner := _children(modules[child])) == 2
        and all(set(parts) == {"kernel", "bias"} for parts in inner.values())
    }
    used = {*norms, *attentions, *dense}
    found.unknown += [full for child in modules if child not in used
                      for full in _full(f"{name}.{child}", modules[child])]  # fmt: skip
    if (len(norms), len(attentions), len(dense)) != (2, 1, 1):
        found.unknown += _full(name, parts)
        return
    for norm, word in zip(_in_order(norms), ("attention_norm", "mlp_norm"), strict=True):
        _norm(modules[norm], ours + word, found)
    _attention(f"{name}.{attentions[0]}", modules[attentions[0]], f"{ours}attention.", found)
    (inner,) = dense.values()
    for layer, word in zip(_in_order(inner), ("mlp.up_proj", "mlp.down_proj"), strict=True):
        _dense(inner[layer], ours + word, found)


def _attention(name: str, parts: Mapping[str, Tensor], ours: str, found: Renamed) -> None:
    """Kernels are (hidden, heads, head_dim), that of the output (heads, head_dim, hidden)."""
    for part, tensor in parts.items():
        module, _, parameter = part.rpartition(".")
        if part == HELD_OMEGA:
            found.tensors[ours + OMEGA] = tensor
        elif module not in PROJECTIONS or parameter not in ("kernel", "bias"):
            found.unknown += _full(name, [part])
        elif parameter == "bias":
            found.tensors[f"{ours}{PROJECTIONS[module]}.bias"] = tensor.flatten()
        else:
            matrix = tensor.flatten(0, 1) if module == "out" else tensor.flatten(1)
            found.tensors[f"{ours}{PROJECTIONS[module]}.weight"] = matrix.mT
    found.num_heads = parts["query.kernel"].shape[1]


def _norm(parts: Mapping[str, Tensor], ours: str, found: Renamed) -> None:
    found.tensors[f"{ours}.weight"] = parts["scale"]
    found.tensors[f"{ours}.bias"] = parts["bias"]


def _dense(parts: Mapping[str, Tensor], ours: str, found: Renamed) -> None:
    found.tensors[f"{ours}.weight"] = parts["kernel"].mT
    if "bias" in parts:
        found.tensors[f"{ours}.bias"] = parts["bias"]


def _children(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first part of their names, and by the rest."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        modules[first][rest] = tensor
    return dict(modules)


def _in_order(names: Iterable[str]) -> list[str]:
    """By the numbers that names end in."""

    def number(name: str) -> int:
        digits = re.search(r"\d+$", name)
        return int(digits[0]) if digits else -1

    return sorted(names, key=number)


def _full(name: str, parts: Iterable[str]) -> list[str]:
    return [f"{name}.{part}".strip(".") for part in parts]


def dialect(layout: Layout) -> Dialect:
    """See `Library.dialect`."""
    if layout.features == "positive":
        return Dialect(feature_epsilon=STABILIZER, renormalizer=STABILIZER, padding_counts=True)
    return Dialect(padding_counts=True)


GOOGLE_JAX = Library(
    rename,
    features=("positive", *KERNELS),
    default=lambda has_omega: "positive",
    dialect=dialect,
    fields={"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "kernel_epsilon": 1e-3},
)
