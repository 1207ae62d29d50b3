"""What a Trainer of this package leaves out of a batch, and what it scores."""

import pytest
import torch

from performers.models import PerformerConfig
from performers.train.tasks import TASKS
from performers.train.trainer import without_needless_mask


def batch(task, lengths):
    torch.manual_seed(0)
    rows = [{"input_ids": torch.randint(4, 24, (length,))} for length in lengths]
    return TASKS[task].evaluation_collator(0)(rows)


OPTIONS = {"reformer": {"num_hashes": 2, "num_buckets": 4, "chunk_size": 8}}


@pytest.mark.parametrize("attention", ["exact", "performer-relu", "performer-positive", "reformer"])
def test_a_causal_loss_is_the_same_without_its_mask(attention):
    config = PerformerConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=17, num_projections=7, attention=attention, hidden_dropout_prob=0.0,
        pad_token_id=0, attention_options=OPTIONS.get(attention),
    )  # fmt: skip
    torch.manual_seed(0)
    model = TASKS["causal-lm"].model(config).eval()
    padded = batch("causal-lm", [31, 17, 23])
    bare = without_needless_mask(padded, TASKS["causal-lm"])
    assert "attention_mask" not in bare
    loss, expected = model(**bare).loss, model(**padded).loss
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_a_masked_model_keeps_its_mask_where_something_is_padded():
    task = TASKS["masked-lm"]
    assert "attention_mask" in without_needless_mask(batch("masked-lm", [31, 17]), task)
    assert "attention_mask" not in without_needless_mask(batch("masked-lm", [17, 17]), task)
