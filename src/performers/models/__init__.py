"""Performers in the form transformers expects, known to its Auto classes once this is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

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

# The Trainer and the pipelines look up in these names what a model predicts. The Trainer would not
# shift the labels of a causal model that is not among them when it smooths labels.
MODEL_MAPPING_NAMES[PerformerConfig.model_type] = PerformerModel.__name__
MODEL_FOR_MASKED_LM_MAPPING_NAMES[PerformerConfig.model_type] = PerformerForMaskedLM.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[PerformerConfig.model_type] = PerformerForCausalLM.__name__
