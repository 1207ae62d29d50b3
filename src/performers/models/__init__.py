"""Performers in the form transformers expects, known to its Auto classes once this is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from performers.models.cache import PerformerCache
from performers.models.config import SIZES, PerformerConfig
from performers.models.mechanisms import MECHANISMS
from performers.models.modeling import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerModel,
    PerformerPreTrainedModel,
)

__all__ = [
    "MECHANISMS",
    "SIZES",
    "PerformerCache",
    "PerformerConfig",
    "PerformerForCausalLM",
    "PerformerForMaskedLM",
    "PerformerModel",
    "PerformerPreTrainedModel",
]

AutoConfig.register(PerformerConfig.model_type, PerformerConfig)
AutoModel.register(PerformerConfig, PerformerModel)
AutoModelForMaskedLM.register(PerformerConfig, PerformerForMaskedLM)
AutoModelForCausalLM.register(PerformerConfig, PerformerForCausalLM)
