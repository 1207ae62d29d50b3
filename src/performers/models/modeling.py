"""The models: pre-norm Transformer blocks around a mechanism that they are given.

embeddings ─► [ x + attention(norm(x)) ─► x + mlp(norm(x)) ] × layers ─► norm ─► head
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.utils.generic import can_return_tuple

from performers.baselines import Drawn
from performers.checks import check_tensor, check_tokens
from performers.models.cache import (
    PerformerCache,
    PerformerEncoderDecoderCache,
    no_continuous_batching,
    prepare_cache,
)
from performers.models.config import PerformerConfig, changed
from performers.models.layers import PerformerLayer, final_norm
from performers.models.losses import cross_entropy
from performers.models.masks import count_positions, packed_segments, padding_mask
from performers.models.mixes import share_between_layers
from performers.models.naming import CACHE, cache_by_either_name
from performers.models.positions import POSITIONS
from performers.models.reversible import run_reversible
from performers.nn import RandomFeatures

__all__ = [
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerModel",
    "PerformerPreTrainedModel",
]

CacheT = TypeVar("CacheT", PerformerCache, PerformerEncoderDecoderCache)
TIED = {"lm_head.weight": "performer.embed_tokens.weight"}  # if config.tie_word_embeddings


class PerformerPreTrainedModel(PreTrainedModel):
    """What all Performer models share: their config, how weights start, and redrawing."""

    config: PerformerConfig
    config_class = PerformerConfig
    base_model_prefix = "performer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["PerformerLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = [CACHE]
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RandomFeatures | Drawn):
            # Only for a new model, or if the checkpoint has no ω: transformers calls this for
            # missing weights.
            module.reset_parameters()

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **options: Any) -> None:
        """Refused, for transformers would warn alone: `config.attention` names the attention."""
        raise ValueError(
            f"a Performer attends as its configuration says, here attention="
            f"{self.config.attention!r}, and asks no attn_implementation: got "
            f"{attn_implementation!r}. Build the model with PerformerConfig(attention=...)."
        )

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **options: Any) -> None:
        """Called by `activation_checkpointing_enable()` and its counterpart."""
        if enable and self.config.reversible:
            raise ValueError(
                "reversible layers keep no activations that a checkpoint could stand for: leave "
                "gradient checkpointing out, or build the model with reversible=False."
            )
        super()._set_gradient_checkpointing(enable, *args, **options)

    def redraw_features(self, generator: Generator | None = None) -> None:
        """Draw ω of every layer anew, as `RandomFeatures.redraw` does, and what else mechanisms
        have drawn; saved with the weights.
        """
        for module in self.modules():
            if isinstance(module, RandomFeatures | Drawn):
                module.redraw(generator)

    def _cache(
        self,
        kind: type[CacheT],
        layers: nn.ModuleList,
        past_key_values: CacheT | None,
        use_cache: bool | None,
    ) -> CacheT | None:
        """The cache that causal layers continue, a new one, or None."""
        if past_key_values is not None:
            if not isinstance(past_key_values, kind):
                raise TypeError(
                    f"past_key_values must be a performers.models.{kind.__name__}, got "
                    f"{type(past_key_values).__name__}. Make it with {kind.__name__}(model.config)."
                )
            return past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.training and any(layer.gradient_checkpointing for layer in layers):
            use_cache = False  # the backward pass would run layers again and count keys twice
        return kind(self.config) if use_cache else None


class PerformerModel(PerformerPreTrainedModel):
    """Embeddings and blocks without a head. Causal if `config.is_decoder`."""

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(config)
        config.check()
        if config.is_encoder_decoder:
            raise ValueError(
                "a model with is_encoder_decoder=True has two stacks, and this class is one: take "
                "PerformerForConditionalGeneration, or PerformerEncoderDecoderModel without a head."
            )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = POSITIONS[config.position](config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            PerformerLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        share_between_layers(self.layers)
        self.norm = final_norm(config)
        self.post_init()

    @can_return_tuple
    @cache_by_either_name
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        past_key_values: PerformerCache | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **packing: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every position.

        `attention_mask`: (batch, length), 1 or True for a real token, 0 for padding on either side;
        with a cache it covers the cached positions as well. Positions are counted over real tokens
        unless `position_ids` gives them. Without a mask, positions that do not count on by one
        begin a new one of packed sequences, each of which is computed as if it were alone; so does
        what `packing` says in the words of transformers' DataCollatorWithFlattening.
        `past_key_values`, or `cache`: a `PerformerCache`, changed in place; the inputs continue its
        sequence.
        `use_cache`: make one; by default only causal models do, outside of training.
        `output_attentions`: return the matrix that each layer implies, quadratic in the length.

        Raises ValueError or TypeError for masks, caches and positions that do not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            check_tokens("input_ids", input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        check_tensor("inputs_embeds", inputs_embeds)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        cache = None
        if self.config.is_decoder:
            cache = self._cache(PerformerCache, self.layers, past_key_values, use_cache)
        elif past_key_values is not None:
            raise ValueError(
                "past_key_values continues a causal sequence, and this model is bidirectional: "
                "build it with is_decoder=True."
            )
        past_length = 0 if cache is None else cache.get_seq_length()
        batch, length = inputs_embeds.shape[:2]
        is_whole = attention_mask is None and past_length == 0
        segment_ids = packed_segments(batch, length, position_ids if is_whole else None, **packing)
        if segment_ids is not None:
            if past_key_values is not None or use_cache:
                raise ValueError(
                    "a cache continues one sequence per row, and these rows are packed with "
                    "several: pass each in a row of its own, or past_key_values=None and "
                    "use_cache=False."
                )
            cache = None
        if output_attentions and past_length:
            raise ValueError(
                "output_attentions needs the keys of the whole sequence, and the cache does not "
                "keep them. Pass the whole sequence with use_cache=False."
            )
        key_padding_mask = padding_mask(attention_mask, batch, past_length, length)
        if position_ids is None:
            counts_padding = (self.config.dialect or {}).get("padding_counts", False)
            position_ids = count_positions(
                None if counts_padding else key_padding_mask,
                past_length,
                inputs_embeds,
                segment_ids,
            )

        hidden = self.dropout(self.positions.add_to(inputs_embeds, position_ids))
        rotation = self.positions.rotation(position_ids)
        hidden_states: list[Tensor] = [hidden]
        matrices: list[Tensor | None] = []
        if self.config.reversible:
            inside = {
                "output_hidden_states": output_hidden_states,
                "output_attentions": output_attentions,
                "use_cache": cache is not None,
            }
            arguments = (rotation, key_padding_mask, cache, output_attentions, segment_ids)
            after, matrices = run_reversible(self.layers, hidden, arguments, inside)
            hidden_states += after
        else:
            for layer in self.layers:
                hidden, matrix = layer(
                    hidden,
                    rotation,
                    key_padding_mask,
                    output_attentions,
                    segment_ids,
                    **{CACHE: cache},
                )
                hidden_states.append(hidden)
                matrices.append(matrix)
        # transformers' convention: the last of the hidden states is the normalized one.
        hidden_states[-1] = hidden = self.norm(hidden_states[-1])
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(matrices) if output_attentions else None,
            **{CACHE: cache},
        )


class PerformerForMaskedLM(PerformerPreTrainedModel):
    """A bidirectional Performer that predicts masked tokens."""

    _tied_weights_keys: ClassVar[dict[str, str]] = TIED
    accepts_loss_kwargs = True  # tells the Trainer to pass num_items_in_batch

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config, is_decoder=False))
        self.performer = PerformerModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **packing: Any,
    ) -> MaskedLMOutput:
        """Logits and, given `labels` (−100 where nothing is to be predicted), the loss.

        Other arguments are those of `PerformerModel.forward`. The loss is the mean over labels, or
        their sum over `num_items_in_batch`, which the Trainer counts over all devices and
        accumulated batches.
        """
        outputs = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        return MaskedLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PerformerForCausalLM(PerformerPreTrainedModel, GenerationMixin):
    """A causal Performer that predicts the next token; `generate()` has a constant state."""

    _tied_weights_keys: ClassVar[dict[str, str]] = TIED
    accepts_loss_kwargs = True  # tells the Trainer to pass num_items_in_batch
    init_continuous_batching = no_continuous_batching

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config, is_decoder=True))
        self.performer = PerformerModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    @cache_by_either_name
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        past_key_values: PerformerCache | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Int[Tensor, " positions"] = 0,
        num_items_in_batch: Tensor | int | None = None,
        **packing: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, given `labels`, the loss of predicting each label from what precedes it.

        `labels` are the tokens themselves, not shifted, with −100 where nothing is to be predicted.
        `shift_labels`: each position's next token, in place of `labels`, from whoever cuts
        sequences over several processes and had to shift before.
        `logits_to_keep`: only the logits of the last so many positions, or of the given ones.
        Other arguments are those of `PerformerModel.forward` and `PerformerForMaskedLM.forward`.
        """
        # Were it an argument by name, the Trainer would take a batch without it for one that has no
        # labels.
        shift_labels = packing.pop("shift_labels", None)
        outputs = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **packing,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if shift_labels is not None:
            loss = cross_entropy(logits, shift_labels, num_items_in_batch)
        elif labels is not None:
            check_tokens("labels", labels)
            loss = cross_entropy(logits[:, :-1], labels[:, 1:], num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any
    ) -> None:
        """Called by `generate()`, which would otherwise make a cache of keys and values."""
        prepare_cache(generation_config, model_kwargs, lambda: PerformerCache(self.config))
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments)
