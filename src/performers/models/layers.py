"""One Transformer block: attention by a mechanism that it is given, and an MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from performers.functional.readout import apply_matrix, implied_matrix
from performers.functional.segments import attend_by_segment
from performers.models.cache import PerformerCache
from performers.models.config import PerformerConfig
from performers.models.fields import PerformerFields
from performers.models.mixes import build_attention
from performers.models.naming import cache_by_either_name
from performers.models.positions import Rotation

__all__ = [
    "MultiHead",
    "PerformerAttention",
    "PerformerLayer",
    "PerformerMLP",
    "ResidualLayer",
    "final_norm",
]


class MultiHead(nn.Module):
    """The projections of multi-head attention, and the mechanism between them."""

    def __init__(self, config: PerformerFields, layer: int) -> None:
        super().__init__()
        self.layer = layer
        assert config.head_dim is not None, "a config has chosen it"
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = (config.num_key_value_heads or config.num_attention_heads) * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size)
        self.k_proj = nn.Linear(config.hidden_size, key_size)
        self.v_proj = nn.Linear(config.hidden_size, key_size)
        self.out_proj = nn.Linear(query_size, config.hidden_size)
        self.mechanism = build_attention(config, layer)

    def heads(
        self, project: nn.Module, hidden: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch heads length head_dim"]:
        # [batch, length, heads · head_dim] → [batch, heads, length, head_dim]
        return project(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class PerformerAttention(MultiHead):
    """Attention of a sequence to itself."""

    def __init__(self, config: PerformerConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.is_causal = config.is_decoder

    def forward(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        rotation: Rotation | None = None,
        key_padding_mask: Bool[Tensor, "batch past_and_length"] | None = None,
        past_key_values: PerformerCache | None = None,
        output_attentions: bool = False,
        segment_ids: Int[Tensor, "batch length"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch length hidden"], Float[Tensor, "batch heads length length"] | None
    ]:
        query, key, value = (
            self.heads(project, hidden) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            query, key = rotation.turn(query), rotation.turn(key)

        mechanism = partial(self.mechanism, is_causal=self.is_causal)

        def attend(value: Tensor) -> Tensor:
            if segment_ids is None:
                return mechanism(query, key, value, key_padding_mask=key_padding_mask)
            return attend_by_segment(mechanism, segment_ids, query, key, value, key_padding_mask)

        matrix = implied_matrix(attend, key) if output_attentions else None
        if past_key_values is None:
            out = attend(value) if matrix is None else apply_matrix(matrix, value)
        else:
            memory = past_key_values.layers[self.layer]
            out = memory.attend(self.mechanism, query, key, value, key_padding_mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), matrix


def final_norm(config: PerformerConfig) -> nn.Module:
    """What stands after the last block."""
    if config.final_norm:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return nn.Identity()


class PerformerMLP(nn.Module):
    """Two linear layers with a nonlinearity between, of width `intermediate_size`."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(
        self, hidden: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class ResidualLayer(GradientCheckpointingLayer):
    """Sublayers that add to a residual path: x + sublayer(norm(x)), so it is never normalized.

    With `norm_first=False`, as in the first Transformer, it is: norm(x + sublayer(x)).
    """

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def before(
        self, norm: nn.Module, hidden: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """What a sublayer with this norm reads."""
        return norm(hidden) if self.norm_first else hidden

    def after(
        self,
        norm: nn.Module,
        hidden: Float[Tensor, "batch length hidden"],
        out: Float[Tensor, "batch length hidden"],
    ) -> Float[Tensor, "batch length hidden"]:
        """The path with what such a sublayer gives."""
        hidden = hidden + out
        return hidden if self.norm_first else norm(hidden)


class PerformerLayer(ResidualLayer):
    """One block: attention of a sequence to itself, and an MLP."""

    def __init__(self, config: PerformerConfig, layer: int) -> None:
        super().__init__(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PerformerAttention(config, layer)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PerformerMLP(config)

    @cache_by_either_name
    def forward(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        rotation: Rotation | None,
        key_padding_mask: Bool[Tensor, "batch past_and_length"] | None,
        output_attentions: bool,
        segment_ids: Int[Tensor, "batch length"] | None,
        past_key_values: PerformerCache | None,
    ) -> tuple[
        Float[Tensor, "batch length hidden"], Float[Tensor, "batch heads length length"] | None
    ]:
        out, matrix = self.attend(
            hidden, rotation, key_padding_mask, past_key_values, output_attentions, segment_ids
        )
        hidden = self.after(self.attention_norm, hidden, out)
        return self.after(self.mlp_norm, hidden, self.transform(hidden)), matrix

    def attend(
        self, hidden: Float[Tensor, "batch length hidden"], *arguments: Any
    ) -> tuple[
        Float[Tensor, "batch length hidden"], Float[Tensor, "batch heads length length"] | None
    ]:
        """What attention adds to the residual path, and its matrix; `arguments` of
        `PerformerAttention.forward` after the first.
        """
        out, matrix = self.attention(self.before(self.attention_norm, hidden), *arguments)
        return self.dropout(out), matrix

    def transform(
        self, hidden: Float[Tensor, "batch length hidden"]
    ) -> Float[Tensor, "batch length hidden"]:
        """What the MLP adds to the residual path."""
        return self.dropout(self.mlp(self.before(self.mlp_norm, hidden)))
