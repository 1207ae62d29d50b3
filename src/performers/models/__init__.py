"""Performers in the form transformers expects, known to its Auto classes once this is imported."""

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from performers.models.cache import PerformerCache, PerformerEncoderDecoderCache
from performers.models.classification import (
    PerformerForSequenceClassification,
    PerformerForSequencePairClassification,
    PerformerForTokenClassification,
)
from performers.models.config import SIZES, PerformerConfig
from performers.models.encoder_decoder import (
    PerformerEncoderDecoderModel,
    PerformerForConditionalGeneration,
)
from performers.models.images import PerformerForImageGeneration
from performers.models.mechanisms import MECHANISMS
from performers.models.modeling import (
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerModel,
    PerformerPreTrainedModel,
)
from performers.models.requirements import check_transformers

__all__ = [
    "MECHANISMS",
    "SIZES",
    "PerformerCache",
    "PerformerConfig",
    "PerformerEncoderDecoderCache",
    "PerformerEncoderDecoderModel",
    "PerformerForCausalLM",
    "PerformerForConditionalGeneration",
    "PerformerForImageGeneration",
    "PerformerForMaskedLM",
    "PerformerForSequenceClassification",
    "PerformerForSequencePairClassification",
    "PerformerForTokenClassification",
    "PerformerModel",
    "PerformerPreTrainedModel",
]

check_transformers(transformers.__version__)

AutoConfig.register(PerformerConfig.model_type, PerformerConfig)

# The Trainer and the pipelines look up in these names what a model predicts. The Trainer would not
# shift the labels of a causal model that is not among them when it smooths labels.
for auto_class, names, model_class in (
    (AutoModel, MODEL_MAPPING_NAMES, PerformerModel),
    (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, PerformerForMaskedLM),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, PerformerForCausalLM),
    (
        AutoModelForSeq2SeqLM,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        PerformerForConditionalGeneration,
    ),
    (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        PerformerForSequenceClassification,
    ),
    (
        AutoModelForTokenClassification,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        PerformerForTokenClassification,
    ),
):
    auto_class.register(PerformerConfig, model_class)
    names[PerformerConfig.model_type] = model_class.__name__

# Those are one class for each kind of config, and this one shifts its labels too.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["performer-images"] = PerformerForImageGeneration.__name__
