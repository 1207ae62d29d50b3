"""Sequence to sequence: an encoder reads, a decoder writes and attends to what was read.

input ─► embeddings ─► encoder ─► keys and values, summed up once ──┐
output so far ─► embeddings ─► decoder ─► [ self, cross ◄───────────┘, mlp ] × layers ─► head
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import Seq2SeqLMOutput, Seq2SeqModelOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from performers.models.cache import (
    PerformerEncoderDecoderCache,
    no_continuous_batching,
    prepare_cache,
)
from performers.models.config import PerformerConfig, changed
from performers.models.decoder import PerformerDecoder
from performers.models.losses import cross_entropy
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel
from performers.models.naming import CACHE, cache_by_either_name

__all__ = ["PerformerEncoderDecoderModel", "PerformerForConditionalGeneration"]


class PerformerEncoderDecoderModel(PerformerPreTrainedModel):
    """An encoder and a decoder, which share the embeddings of their tokens, without a head."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config, is_encoder_decoder=True, is_decoder=False))
        self.config.check()
        self.encoder = PerformerModel(changed(self.config, is_encoder_decoder=False))
        self.decoder = PerformerDecoder(self.config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    @cache_by_either_name
    def forward(
        self,
        input_ids: Int[Tensor, "batch encoder_length"] | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "batch length"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PerformerEncoderDecoderCache | None = None,
        inputs_embeds: Float[Tensor, "batch encoder_length hidden"] | None = None,
        decoder_inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Seq2SeqModelOutput:
        """Hidden states of every position of the output.

        `attention_mask`, `decoder_attention_mask`: of the input and of the output, each as in
        `PerformerModel.forward`. `encoder_outputs`: what `self.encoder` returned, in place of
        `input_ids`; the attention_mask is still that of the input. `past_key_values`, or
        `cache`: a `PerformerEncoderDecoderCache`, changed in place; the decoder's inputs continue
        its sequence, and once it has taken in an encoder's output, it asks for no other.
        `output_attentions`: matrices of the encoder, of the decoder and between them.

        Raises ValueError or TypeError for what does not fit.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
            )
        elif input_ids is not None or inputs_embeds is not None:
            raise ValueError(
                "pass the encoder's input or its output, not both: got encoder_outputs and "
                f"{'input_ids' if inputs_embeds is None else 'inputs_embeds'}."
            )
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("pass exactly one of decoder_input_ids and decoder_inputs_embeds.")
        if decoder_inputs_embeds is None:
            decoder_inputs_embeds = self.encoder.embed_tokens(decoder_input_ids)
        cache = self._cache(
            PerformerEncoderDecoderCache, self.decoder.layers, past_key_values, use_cache
        )
        decoded = self.decoder(
            decoder_inputs_embeds,
            decoder_attention_mask,
            encoder_outputs[0],
            attention_mask,
            cache,
            output_attentions,
            output_hidden_states,
        )
        return Seq2SeqModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            **{CACHE: cache},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )


class PerformerForConditionalGeneration(PerformerPreTrainedModel, GenerationMixin):
    """An encoder-decoder that predicts the next token of the output, as BART and T5 do.

    With FAVOR+ `generate()` reads the input once, into a state per layer of cross-attention; a
    token then costs the same after any length of the input and of the output.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "lm_head.weight": "performer.encoder.embed_tokens.weight"
    }
    accepts_loss_kwargs = True  # tells the Trainer to pass num_items_in_batch
    init_continuous_batching = no_continuous_batching

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config, is_encoder_decoder=True, is_decoder=False))
        self.performer = PerformerEncoderDecoderModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    @cache_by_either_name
    def forward(
        self,
        input_ids: Int[Tensor, "batch encoder_length"] | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "batch length"] | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: PerformerEncoderDecoderCache | None = None,
        inputs_embeds: Float[Tensor, "batch encoder_length hidden"] | None = None,
        decoder_inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits and, given `labels` (−100 where nothing is to be predicted), the loss.

        `labels`: the output itself; the decoder reads it shifted to the right, unless its inputs
        are given. Other arguments are those of `PerformerEncoderDecoderModel.forward` and
        `PerformerForMaskedLM.forward`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        return Seq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )

    def prepare_decoder_input_ids_from_labels(
        self, labels: Int[Tensor, "batch length"]
    ) -> Int[Tensor, "batch length"]:
        """The labels shifted to the right behind the first token; DataCollatorForSeq2Seq asks for
        it.

        −100 becomes pad_token_id or, where there is none, the first token once more.
        Raises ValueError for a config that names no first token.
        """
        config = self.config
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ValueError(
                "labels are shifted behind the token that a decoder reads first: give the config a "
                "decoder_start_token_id or a bos_token_id, or pass decoder_input_ids."
            )
        shifted = labels.roll(1, dims=1)
        shifted[:, :1] = start
        unseen = start if config.pad_token_id is None else config.pad_token_id
        return shifted.masked_fill(shifted == -100, unseen)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any
    ) -> None:
        """Called by `generate()`, which would otherwise make a cache of keys and values."""
        prepare_cache(
            generation_config, model_kwargs, lambda: PerformerEncoderDecoderCache(self.config)
        )
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments)
