"""What a device keeps of a forward pass until the backward pass has used it.

Bytes per token of a layer of width h, with inner width f and q = heads · dim, w bytes of a number
in products (2 under autocast, else 4):

    norm ─► attention ─► + ─► norm ─► MLP ─► +
    4h, wh   w q         4h   wh     w·2f

4h is the residual path in float32, 2f the input and the output of GELU. Under autocast each of the
three projections makes a copy of its own of the normalized input. Norms keep two numbers per token,
dropout a byte per number. `attention` has what attention itself keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from performers.models.layers import PerformerLayer
from performers.models.positions import Rotary
from performers.planning.attention import WIDE, HeadsOf, groups_of
from performers.planning.workload import Workload

__all__ = ["LayerBytes", "attention_of", "bytes_of_head", "bytes_of_inputs", "bytes_of_layers"]

STATISTICS = 2 * WIDE  # mean and deviation of a norm


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer: its input; what it keeps, and for that weights in half precision; what its
    backward pass needs beside both, first for the MLP and then, when that is done, for attention.
    """

    read: int
    kept: int
    casts: int
    of_mlp: int
    of_attention: int


def attention_of(workload: Workload, layer: PerformerLayer) -> list[HeadsOf]:
    """The mechanisms of a layer. Raises ValueError for one without formulas."""
    attention, config = layer.attention, workload.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    assert key_heads is not None, "a config has chosen it"
    return groups_of(attention.mechanism, heads, key_heads, attention.head_dim, attention.is_causal)


def bytes_of_layers(workload: Workload) -> list[LayerBytes]:
    """In order. Raises ValueError where `attention_of` does."""
    return [_bytes_of_layer(workload, layer) for layer in workload.layers]


def _bytes_of_layer(workload: Workload, layer: PerformerLayer) -> LayerBytes:
    config, tokens, width = workload.config, workload.tokens, workload.width
    hidden, inner = config.hidden_size, config.intermediate_size
    projected = config.num_attention_heads * layer.attention.head_dim
    groups = attention_of(workload, layer)
    is_asked = any(group.form != "none" for group in groups)
    # Each projection that is differentiated casts its input for itself.
    copies = (3 if is_asked else 1) if workload.is_half else 1
    dropped = hidden if config.hidden_dropout_prob else 0
    mlp = tokens * (
        WIDE * hidden + width * (hidden + _kept_by(layer.mlp.activation) * inner) + STATISTICS
    )
    kept = mlp + tokens * (
        WIDE * hidden + width * (copies * hidden + projected) + STATISTICS + 2 * dropped
    )
    casts = sum(x.numel() for x in layer.parameters()) if workload.is_half else 0
    kept += sum(group.kept(workload.batch, workload.length, width) for group in groups)
    # Gradients, first of the MLP, where all is kept, then of attention, where the MLP is done.
    path = WIDE * tokens * hidden
    of_mlp = path + width * tokens * 2 * inner
    of_attention = path + sum(
        width * tokens * 2 * (group.heads + group.key_heads) * group.dim
        + group.work(workload.batch, workload.length)
        for group in groups
        if group.form != "none"
    )
    return LayerBytes(path, kept, casts * workload.width, of_mlp, of_attention - mlp)


def bytes_of_inputs(workload: Workload) -> int:
    """What is kept from tokens to the first layer: their numbers, dropout, rotations."""
    config, tokens = workload.config, workload.tokens
    kept = 8 * tokens
    if config.hidden_dropout_prob:
        kept += tokens * config.hidden_size
    if isinstance(workload.model.performer.positions, Rotary):
        assert config.head_dim is not None, "a config has chosen it"
        kept += WIDE * workload.length * config.head_dim
    return kept


def bytes_of_head(workload: Workload) -> tuple[int, int]:
    """What the last norm, the logits and the loss keep, and what the loss needs for a moment."""
    config, tokens = workload.config, workload.tokens
    norm = (WIDE + workload.width) * config.hidden_size + STATISTICS
    # Logs of probabilities in float32; then their gradient, and that of the logits.
    logits = WIDE * config.vocab_size
    return tokens * (norm + logits + 8), tokens * 2 * logits


def _kept_by(activation: nn.Module) -> int:
    """How many numbers per number the nonlinearity and the layer after it keep: for ReLU, which
    needs its output alone, 1; for GELU, which needs its input, 2.
    """
    kept: set[int] = set()

    def note(x: Tensor) -> Tensor:
        kept.add(x.data_ptr())
        return x

    x = torch.ones(7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = activation(x * 1)
    return len(kept | {out.data_ptr()})
