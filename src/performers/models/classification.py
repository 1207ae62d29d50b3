"""Heads that classify: whole sequences, each token, and pairs of sequences."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from performers.models.config import PerformerConfig, changed
from performers.models.losses import cross_entropy
from performers.models.modeling import PerformerModel, PerformerPreTrainedModel

__all__ = [
    "PerformerForSequenceClassification",
    "PerformerForSequencePairClassification",
    "PerformerForTokenClassification",
]


class PerformerForSequenceClassification(PerformerPreTrainedModel):
    """One class, several or a number for each whole sequence, from one vector for it.

    The vector is the mean over real tokens; of a causal model (`is_decoder=True`) the last real
    token, the only one that has seen all.
    """

    accepts_loss_kwargs = False  # a mean over sequences, which the Trainer averages over batches

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config))
        self.num_labels = config.num_labels
        self.performer = PerformerModel(self.config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length hidden"] | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of each sequence and, given `labels`, the loss that `config.problem_type` names.

        "regression" is the mean squared error, "single_label_classification" the cross-entropy of
        whole numbers, "multi_label_classification" the binary cross-entropy of (batch, num_labels)
        numbers from 0 to 1; None takes what num_labels and the dtype of labels suggest. Other
        arguments are those of `PerformerModel.forward`; rows are not packed with several sequences.
        """
        outputs = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        pooled = pool(outputs.last_hidden_state, attention_mask, self.config.is_decoder)
        logits = self.classifier(self.dropout(pooled))
        return SequenceClassifierOutput(
            loss=_sequence_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PerformerForTokenClassification(PerformerPreTrainedModel):
    """A class for each token: secondary structure, named entities, and the like."""

    accepts_loss_kwargs = True  # tells the Trainer to pass num_items_in_batch

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config))
        self.num_labels = config.num_labels
        self.performer = PerformerModel(self.config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
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
    ) -> TokenClassifierOutput:
        """Logits of each token and, given `labels` (−100 where there is none), the mean
        cross-entropy.

        Other arguments are those of `PerformerModel.forward` and `PerformerForMaskedLM.forward`.
        """
        outputs = self.performer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **packing,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        return TokenClassifierOutput(
            loss=None if labels is None else cross_entropy(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PerformerForSequencePairClassification(PerformerPreTrainedModel):
    """Whether, or how, two sequences belong together: a dual encoder, as in the retrieval task of
    Long Range Arena.

        u, v = vector(first), vector(second)                by one encoder, each sequence by itself
        logits = W₂ f(W₁ [u, v, u ∘ v, u − v] + b₁) + b₂    f: hidden_act

    No token of one sequence attends to the other, so vectors of a collection can be computed ahead
    (`encode`) and compared with any query (`compare`).

    Source: Tay et al. 2021, "Long Range Arena", Section 2.2.3; the four parts of Conneau et al.
    2017, "Supervised Learning of Universal Sentence Representations", Section 3.1.
    """

    accepts_loss_kwargs = False  # a mean over pairs, which the Trainer averages over batches

    def __init__(self, config: PerformerConfig) -> None:
        super().__init__(changed(config))
        self.num_labels = config.num_labels
        self.performer = PerformerModel(self.config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.comparison = nn.Linear(4 * config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.classifier = nn.Linear(config.intermediate_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        second_input_ids: Int[Tensor, "batch second_length"],
        attention_mask: Tensor | None = None,
        second_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits of each pair and, given `labels`, the loss, as in
        `PerformerForSequenceClassification.forward`.
        """
        first = self.encode(input_ids, attention_mask)
        second = self.encode(second_input_ids, second_attention_mask)
        logits = self.compare(first, second)
        return SequenceClassifierOutput(
            loss=_sequence_loss(logits, labels, self.config), logits=logits
        )

    def encode(
        self, input_ids: Int[Tensor, "batch length"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """One vector for each sequence, as in `PerformerForSequenceClassification`."""
        outputs = self.performer(
            input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
        )
        return pool(outputs.last_hidden_state, attention_mask, self.config.is_decoder)

    def compare(
        self, first: Float[Tensor, "batch hidden"], second: Float[Tensor, "batch hidden"]
    ) -> Float[Tensor, "batch num_labels"]:
        """Logits from the vectors of two sequences."""
        parts = torch.cat([first, second, first * second, first - second], dim=-1)
        return self.classifier(self.dropout(self.activation(self.comparison(parts))))


def pool(
    hidden: Float[Tensor, "batch length hidden"], attention_mask: Tensor | None, is_causal: bool
) -> Float[Tensor, "batch hidden"]:
    """One vector for each sequence: the mean over real tokens or, if causal, the last real token.

    0 for a sequence without real tokens.
    """
    # In float32: half precision cannot count to a long length, nor sum up as much.
    accurate = torch.promote_types(hidden.dtype, torch.float32)
    if attention_mask is None:
        attention_mask = hidden.new_ones(hidden.shape[:2])
    weights = attention_mask.to(accurate)
    if is_causal:
        from_here_on = weights.flip(1).cumsum(dim=1).flip(1)  # the number of real tokens
        weights = weights * (from_here_on == 1)
    total = (weights.unsqueeze(1) @ hidden.to(accurate)).squeeze(1)
    return (total / weights.sum(dim=1, keepdim=True).clamp(min=1)).to(hidden.dtype)


def _sequence_loss(
    logits: Float[Tensor, "batch num_labels"],
    labels: Tensor | None,
    config: PerformerConfig,
) -> Float[Tensor, ""] | None:
    if labels is None:
        return None
    if len(labels) != len(logits):
        raise ValueError(
            f"labels must have one entry, or row, per sequence: got {tuple(labels.shape)} for "
            f"{len(logits)}."
        )
    return ForSequenceClassificationLoss(labels, logits.float(), config)
