"""pytorch-fast-transformers 0.4.0: `TransformerEncoder`, its recurrent form, and `AttentionLayer`.

    layers.N.attention     query_projection, key_projection, value_projection, out_projection,
                           inner_attention.feature_map.omega
    layers.N               linear1, linear2, norm1, norm2
    norm                   the last norm, if there is one

Embeddings and heads are the user's own. A state dict does not say whether attention was causal, the
number of heads without ω, the feature map, its temperature, or the activation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from performers.kernels import KERNELS
from performers.migration.library import OMEGA, Layout, Library, Renamed
from performers.nn.dialect import Dialect

__all__ = ["FAST_TRANSFORMERS"]

NORMALIZER_EPSILON = 1e-6  # `eps` of LinearAttention and CausalLinearAttention

ATTENTION = {
    "query_projection": "q_proj",
    "key_projection": "k_proj",
    "value_projection": "v_proj",
    "out_projection": "out_proj",
}
LAYER = {
    **{f"attention.{theirs}": f"attention.{ours}" for theirs, ours in ATTENTION.items()},
    "linear1": "mlp.up_proj",
    "linear2": "mlp.down_proj",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
}
THEIR_OMEGA = "inner_attention.feature_map.omega"
IN_A_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def rename(tensors: Mapping[str, Tensor]) -> Renamed:
    """See `Library.rename`."""
    if any("cross_attention." in name for name in tensors):
        raise ValueError(
            "this fast-transformers model has cross-attention (TransformerDecoder), which no model "
            "here has. Import its self-attention layers one at a time, by the state dict of each "
            "AttentionLayer, and keep the rest of the model."
        )
    found = Renamed()
    for name, tensor in tensors.items():
        inside = IN_A_LAYER.fullmatch(name)
        words = inside[2] if inside else name
        module, _, parameter = words.rpartition(".")
        table = LAYER if inside else ATTENTION
        attention = "attention." if inside else ""
        if words == attention + THEIR_OMEGA:
            ours, tensor = attention + OMEGA, tensor.mT  # (dim, m) there
        elif module in table and parameter in ("weight", "bias"):
            ours = f"{table[module]}.{parameter}"
        elif words in ("norm.weight", "norm.bias") and not inside:
            ours = words
        else:
            found.unknown.append(name)
            continue
        found.tensors[f"layers.{inside[1]}.{ours}" if inside else ours] = tensor
    return found


def dialect(layout: Layout) -> Dialect | None:
    """See `Library.dialect`."""
    if layout.features == "exact":
        return None
    if layout.features == "hyperbolic":
        return Dialect(normalizer_epsilon=NORMALIZER_EPSILON)
    # Its features of kernels lack the factor 1/√m of ours, so its D is m times as large.
    return Dialect(normalizer_epsilon=NORMALIZER_EPSILON / layout.num_columns)


FAST_TRANSFORMERS = Library(
    rename,
    features=("hyperbolic", "exact", *KERNELS),
    default=lambda has_omega: "hyperbolic" if has_omega else "elu+1",
    dialect=dialect,
    fields={
        "hidden_act": "relu",
        "layer_norm_eps": 1e-5,
        "kernel_epsilon": 0.0,
        "norm_first": False,
    },
)
