"""Fine-tuning after a conversion undoes an error, and does nothing where there is none."""

import copy

import pytest
import torch
from tiny_models import WORDS, bert

from performers.models import PerformerConfig
from performers.train.fine_tuning import ENCODER, fine_tune, fine_tuning_task


@pytest.mark.parametrize("name", ["PerformerForCausalLM", "PerformerForMaskedLM"])
def test_a_performer_is_not_converted_again(name):
    with pytest.raises(ValueError, match="this one is a Performer already"):
        fine_tuning_task(PerformerConfig(architectures=[name]))


def test_a_model_that_equals_its_teacher_is_left_as_it_is(tmp_path):
    """Its loss is 0, as long as no dropout disturbs it."""
    model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    before = copy.deepcopy(model.state_dict())
    rows = torch.randint(5, WORDS, (6, 13))
    fine_tune(
        model, copy.deepcopy(model), ENCODER, rows, None, tmp_path,
        steps=2, batch_size=3, learning_rate=1e-2, lora_rank=0, seed=0,
    )  # fmt: skip
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
