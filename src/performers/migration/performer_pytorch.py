"""performer-pytorch 1.1.4: `PerformerLM`, `Performer` and `SelfAttention`, and scBERT's copy of it.

    token_emb, pos_emb, layer_pos_emb     embeddings and tables of positions
    performer.net.layers.N.0              norm, fn.to_q, fn.to_k, fn.to_v, fn.to_out,
                                          fn.fast_attention.projection_matrix
    performer.net.layers.N.1              norm, fn.fn.w1, fn.fn.w2
    norm, to_out                          last norm and head

A state dict does not say whether the model was causal, which kernel it had
(`generalized_attention`, `kernel_fn`, `no_projection`), or whether every second layer was one of
cross-attention.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from performers.kernels import KERNELS
from performers.migration.library import OMEGA, Layout, Library, Renamed
from performers.nn.dialect import Dialect

__all__ = ["PERFORMER_PYTORCH"]

FEATURE_EPSILON = 1e-4  # of `softmax_kernel`
KEY_SUM_EPSILON = 1e-6  # of `causal_linear_attention`

MODEL = {
    "token_emb.weight": "embed_tokens.weight",
    "pos_emb.emb.weight": "positions.embedding.weight",
    "pos_emb.emb": "positions.added",
    "layer_pos_emb.emb": "positions.turning",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "to_out.weight": "lm_head.weight",
    "to_out.bias": "lm_head.bias",
}
ATTENTION = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out": "out_proj",
    "fast_attention.projection_matrix": OMEGA,
}
LAYER = {
    "0.norm": "attention_norm",
    **{f"0.fn.{theirs}": f"attention.{ours}" for theirs, ours in ATTENTION.items()},
    "1.norm": "mlp_norm",
    "1.fn.fn.w1": "mlp.up_proj",
    "1.fn.fn.w2": "mlp.down_proj",
}
IN_A_LAYER = re.compile(r"(?:performer\.)?net\.layers\.(\d+)\.(.+)")
# The same layers once more, and a counter.
REPEATED = re.compile(r"(performer\.)?proj_updater\..*")

INSTEAD = (
    "Where its attention is a plain SelfAttention, import these layers one at a time, by the state "
    "dict of each, and keep the rest of the model; or train a PerformerForMaskedLM or "
    "PerformerForCausalLM of that size."
)
# Names that only models with something of their own have.
REFUSED = {
    r"^(enc|dec)\.": "an encoder and a decoder (PerformerEncDec)",
    r"\.blocks\.\d+\.[fg]\.net\.": "reversible layers (reversible=True)",
    r"local_attn\.": "heads of local attention (local_attn_heads)",
    r"\.0\.fn\.fn\.to_q\.": "shifted tokens (shift_tokens=True)",
}


def rename(tensors: Mapping[str, Tensor]) -> Renamed:
    """See `Library.rename`."""
    _refuse(tensors)
    found = Renamed()
    axial: dict[int, Tensor] = {}
    is_layer = "to_q.weight" in tensors
    for name, tensor in tensors.items():
        if REPEATED.fullmatch(name):
            continue
        ours = _ours(name, is_layer)
        if name.startswith("pos_emb.weights."):
            axial[int(name.rpartition(".")[2])] = tensor
        elif ours is None:
            found.unknown.append(name)
        else:
            found.tensors[ours] = tensor
    if axial:
        found.tensors["positions.embedding.weight"] = _axial_table(axial)
    if "positions.turning" in found.tensors:
        found.tensors = {
            name: _paired(name, tensor, found) for name, tensor in found.tensors.items()
        }
    return found


def _refuse(tensors: Mapping[str, Tensor]) -> None:
    what = None
    for pattern, words in REFUSED.items():
        if any(re.search(pattern, name) for name in tensors):
            what = words
    for name, tensor in tensors.items():
        if name.endswith(".g"):
            what = "ReZero (use_rezero)" if tensor.ndim == 0 else "ScaleNorm (use_scalenorm)"
        down = tensors.get(name.replace(".w1.", ".w2.")) if name.endswith(".w1.weight") else None
        if down is not None and len(tensor) == 2 * down.shape[1]:
            what = "gated feed-forward layers (ff_glu=True)"
    if what is not None:
        raise ValueError(
            f"this performer-pytorch model has {what}, which no model here has. {INSTEAD}"
        )


def _ours(name: str, is_layer: bool) -> str | None:
    """The name of a tensor here; None where it has none. An attention layer's to_out is no head."""
    inside = IN_A_LAYER.fullmatch(name)
    above, words = (f"layers.{inside[1]}.", inside[2]) if inside else ("", name)
    table = LAYER if inside else ATTENTION if is_layer else MODEL
    module, _, parameter = words.rpartition(".")
    if words in table:
        return above + table[words]
    if module in table and parameter in ("weight", "bias"):
        return f"{above}{table[module]}.{parameter}"
    return None


def _axial_table(parts: Mapping[int, Tensor]) -> Tensor:
    """One row per position of AxialPositionalEmbedding: the sum of its axes, row-major."""
    rows = [parts[axis][0] for axis in sorted(parts)]
    total = rows[0]
    for part in rows[1:]:
        total = total + part
    return total.flatten(0, -2)


def _paired(name: str, tensor: Tensor, found: Renamed) -> Tensor:
    """Coordinates in our order where performer-pytorch turns them.

    It turns neighbors (0, 1), (2, 3), …, and we turn i and i + dim/2. Attention only has products
    of queries with keys, and of both with ω, so all of these may be permuted alike.
    """
    dim = found.tensors["positions.turning"].shape[1]
    order = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    if name.endswith(OMEGA):
        return tensor[:, order]
    if re.search(r"\.(q_proj|k_proj)\.", name):
        return tensor.unflatten(0, (-1, dim))[:, order].flatten(0, 1)
    return tensor


def dialect(layout: Layout) -> Dialect:
    """See `Library.dialect`."""
    key_sum_epsilon = KEY_SUM_EPSILON if layout.is_causal else 0.0
    if layout.features == "positive":
        return Dialect(
            feature_epsilon=FEATURE_EPSILON, key_sum_epsilon=key_sum_epsilon, padding_counts=True
        )
    return Dialect(
        # Its features of kernels lack the factor 1/√m of ours.
        key_sum_epsilon=key_sum_epsilon / layout.num_columns**0.5,
        padding_counts=True,
        scale=layout.head_dim**-0.5,
    )


PERFORMER_PYTORCH = Library(
    rename,
    features=("positive", *KERNELS),
    default=lambda has_omega: "positive",
    dialect=dialect,
    fields={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "kernel_epsilon": 1e-3},
    ties_head=True,
)
