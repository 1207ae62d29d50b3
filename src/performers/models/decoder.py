"""The decoder of an encoder-decoder: blocks that also attend to what an encoder has read."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.functional.readout import apply_matrix, implied_matrix
from performers.models.cache import PerformerEncoderDecoderCache
from performers.models.config import PerformerConfig, decoder_config
from performers.models.layers import (
    MultiHead,
    PerformerAttention,
    PerformerMLP,
    ResidualLayer,
    final_norm,
)
from performers.models.masks import count_positions, padding_mask
from performers.models.mechanisms import cross_config
from performers.models.naming import CACHE, cache_by_either_name
from performers.models.positions import POSITIONS, Rotation

__all__ = ["Decoded", "Encoded", "PerformerDecoder", "PerformerDecoderLayer"]

Matrix = Float[Tensor, "batch heads length length"] | None
CrossMatrix = Float[Tensor, "batch heads length encoder_length"] | None


class Encoded(NamedTuple):
    """What is known of the encoder's output besides itself: which keys are real, and where."""

    key_padding_mask: Bool[Tensor, "batch encoder_length"] | None
    rotation: Rotation | None


class Decoded(NamedTuple):
    """What a decoder returns, the matrices and states of all layers where they were asked for."""

    last_hidden_state: Float[Tensor, "batch length hidden"]
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None


class PerformerCrossAttention(MultiHead):
    """Attention of a decoder to the output of an encoder, whose keys are read once.

    Rotary positions turn queries by their place in the output and keys by theirs in the input, so
    that a head can look at the place that corresponds to its own.
    """

    def forward(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        encoder_hidden: Float[Tensor, "batch encoder_length hidden"],
        rotation: Rotation | None,
        encoded: Encoded,
        past_key_values: PerformerEncoderDecoderCache | None = None,
        output_attentions: bool = False,
    ) -> tuple[Float[Tensor, "batch length hidden"], CrossMatrix]:
        query = self.heads(self.q_proj, hidden)
        if rotation is not None:
            query = rotation.turn(query)
        memory = (
            None
            if past_key_values is None
            else past_key_values.cross_attention_cache.layers[self.layer]
        )
        matrix = None
        if memory is not None and memory.get_seq_length():
            out = memory.recall(self.mechanism, query)
        else:
            key, value = (
                self.heads(project, encoder_hidden) for project in (self.k_proj, self.v_proj)
            )
            if encoded.rotation is not None:
                key = encoded.rotation.turn(key)
            mask = encoded.key_padding_mask

            def attend(value: Tensor) -> Tensor:
                return self.mechanism(query, key, value, key_padding_mask=mask)

            if memory is not None:
                memory.remember(self.mechanism, key, value, mask)
            if output_attentions:
                matrix = implied_matrix(attend, key)
                out = apply_matrix(matrix, value)
            else:
                out = memory.recall(self.mechanism, query) if memory is not None else attend(value)
        return self.out_proj(out.transpose(1, 2).flatten(2)), matrix


class PerformerDecoderLayer(ResidualLayer):
    """One block: attention to what is written, attention to what was read, and an MLP."""

    def __init__(self, config: PerformerConfig, layer: int) -> None:
        super().__init__(config)
        self.attention = PerformerAttention(config, layer)
        self.cross_attention = PerformerCrossAttention(cross_config(config), layer)
        self.mlp = PerformerMLP(config)
        self.attention_norm, self.cross_attention_norm, self.mlp_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(3)
        )

    @cache_by_either_name
    def forward(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        encoder_hidden: Float[Tensor, "batch encoder_length hidden"],
        rotation: Rotation | None,
        key_padding_mask: Bool[Tensor, "batch past_and_length"] | None,
        encoded: Encoded,
        output_attentions: bool,
        past_key_values: PerformerEncoderDecoderCache | None,
    ) -> tuple[Float[Tensor, "batch length hidden"], Matrix, CrossMatrix]:
        written = None if past_key_values is None else past_key_values.self_attention_cache
        out, matrix = self.attention(
            self.before(self.attention_norm, hidden),
            rotation,
            key_padding_mask,
            written,
            output_attentions,
        )
        hidden = self.after(self.attention_norm, hidden, self.dropout(out))
        out, cross_matrix = self.cross_attention(
            self.before(self.cross_attention_norm, hidden),
            encoder_hidden,
            rotation,
            encoded,
            past_key_values,
            output_attentions,
        )
        hidden = self.after(self.cross_attention_norm, hidden, self.dropout(out))
        out = self.mlp(self.before(self.mlp_norm, hidden))
        return self.after(self.mlp_norm, hidden, self.dropout(out)), matrix, cross_matrix


class PerformerDecoder(nn.Module):
    """A causal stack of blocks over embeddings, which attends to an encoder's output too."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__()
        config = decoder_config(config)
        self.positions = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            PerformerDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = final_norm(config)

    def forward(
        self,
        embeddings: Float[Tensor, "batch length hidden"],
        attention_mask: Tensor | None,
        encoder_hidden: Float[Tensor, "batch encoder_length hidden"],
        encoder_attention_mask: Tensor | None,
        past_key_values: PerformerEncoderDecoderCache | None,
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> Decoded:
        """Hidden states of every position; masks as in `PerformerModel.forward`.

        Raises ValueError or TypeError for masks and caches that do not fit.
        """
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if output_attentions and past_length:
            raise ValueError(
                "output_attentions needs the keys of the whole sequence, and the cache does not "
                "keep them. Pass the whole sequence with use_cache=False."
            )
        batch, length = embeddings.shape[:2]
        mask = padding_mask(attention_mask, batch, past_length, length)
        encoder_mask = padding_mask(encoder_attention_mask, batch, 0, encoder_hidden.shape[1])
        position_ids = count_positions(mask, past_length, embeddings)
        hidden = self.dropout(self.positions.add_to(embeddings, position_ids))
        rotation = self.positions.rotation(position_ids)
        encoder_positions = count_positions(encoder_mask, 0, encoder_hidden)
        encoded = Encoded(encoder_mask, self.positions.rotation(encoder_positions))
        hidden_states, matrices, cross_matrices = [hidden], [], []
        for layer in self.layers:
            hidden, matrix, cross_matrix = layer(
                hidden,
                encoder_hidden,
                rotation,
                mask,
                encoded,
                output_attentions,
                **{CACHE: past_key_values},
            )
            hidden_states.append(hidden)
            matrices.append(matrix)
            cross_matrices.append(cross_matrix)
        hidden_states[-1] = hidden = self.norm(hidden)
        return Decoded(
            hidden,
            tuple(hidden_states) if output_hidden_states else None,
            tuple(matrices) if output_attentions else None,
            tuple(cross_matrices) if output_attentions else None,
        )
