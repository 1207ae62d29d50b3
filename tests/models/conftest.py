"""Models of a few thousand weights, whose sizes are distinct primes where they may be."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from performers.models import PerformerConfig

VOCABULARY = 31


@pytest.fixture
def tiny_config() -> Callable[..., PerformerConfig]:
    """A config of two layers and three heads of dim 8, with any field changed."""

    def make(**overrides: object) -> PerformerConfig:
        return PerformerConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 41,
                "num_projections": 17,
                "image_shape": [3, 5, 2],  # for position="image"
                # Large weights make attention sharp and generated text varied.
                "initializer_range": 0.3,
                **overrides,
            }
        )

    return make


@pytest.fixture
def tiny_model(tiny_config) -> Callable[..., PreTrainedModel]:
    """A model of the given class in evaluation, with any field of its config changed."""

    def make(model_class: type[PreTrainedModel], **overrides: object) -> PreTrainedModel:
        torch.manual_seed(3)
        return model_class(tiny_config(**overrides)).eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three sequences of eleven tokens."""
    return torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(5))
