"""Converted models under torch.autocast, where rotary queries and keys are wider than values."""

import pytest
import torch
from tiny_models import TINY, WORDS, inputs_for
from transformers import AutoConfig, AutoModelForCausalLM

import performers
from performers.convert import FavorOptions

SIZES = TINY | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
SIZES |= {"head_dim": 8, "initializer_range": 0.1, "pad_token_id": 0}
SIZES |= {"attention_dropout": 0.0, "hidden_dropout": 0.0, "residual_dropout": 0.0}
MODEL_TYPES = ["llama", "mistral", "qwen3", "gemma", "phi", "gpt_neox", "starcoder2"]


def linearized(model_type: str):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    # One head exact, so that both mechanisms meet the dtypes.
    return performers.linearize(model, FavorOptions(17, window_size=3, exact_heads={1: [0]}))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_it_trains_and_generates_under_autocast(model_type):
    model = linearized(model_type).train()
    inputs = inputs_for(model)
    inputs["labels"] = inputs["input_ids"]
    expected = model(**inputs, use_cache=False).loss
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        assert abs(loss - expected) < 0.01 * expected
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    model.gradient_checkpointing_disable()
    model.eval()
    del inputs["labels"]
    options = {"max_new_tokens": 5, "do_sample": False}
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**inputs, **options)
        assert torch.equal(tokens, model.generate(**inputs, **options, use_cache=False))
    assert tokens.max() < WORDS


# In a process of its own: what accelerate knows of precision, it knows once for all.
TRAINER = """
import sys
sys.path.insert(0, "tests")
import torch
import performers
from tiny_models import llama
from transformers import Trainer, TrainingArguments
from accelerate.state import AcceleratorState

rows = [{"input_ids": row, "labels": row} for row in torch.arange(8 * 13).reshape(8, 13) % 91 + 3]


def final_loss(folder, **precision):
    torch.manual_seed(0)
    model = llama()
    performers.linearize(model, performers.FavorOptions(17))
    arguments = TrainingArguments(
        folder, max_steps=50, per_device_train_batch_size=8, learning_rate=3e-4, logging_steps=50,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True, **precision,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    with torch.no_grad():
        ids = torch.stack([row["input_ids"] for row in rows])
        return model(ids, labels=ids).loss.item()
"""


@pytest.mark.slow
def test_a_linearized_llama_trains_in_bfloat16_as_in_float32(fresh_python, tmp_path):
    """50 steps of transformers' Trainer end within 1 % of the loss of float32."""
    losses = [
        float(
            fresh_python(TRAINER + f"print(final_loss({str(tmp_path)!r}, bf16={bf16}))").split()[-1]
        )
        for bf16 in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[0] < 4  # from about 5.6, so that there is something to agree on
