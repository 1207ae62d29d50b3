"""No input of a model or of a conversion may be mistaken for another kind of thing."""

import numpy as np
import pytest
import torch
from kinds import OTHERS
from refusals import outcome
from transformers import LlamaConfig, LlamaForCausalLM

import performers
from performers.sklearn import RandomKernelFeatures

TOKENS = torch.arange(10).view(2, 5)
SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 11}
CONFIG = performers.PerformerConfig(**SIZES, intermediate_size=8, num_projections=4)
CAUSAL = performers.PerformerForCausalLM(CONFIG)
MASKED = performers.PerformerForMaskedLM(CONFIG)
ROWS = np.random.RandomState(0).randn(20, 5)
LLAMA = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=8))

# By name: what takes inputs, and inputs that it serves.
ENTRANCES = {
    "a causal model": (
        CAUSAL,
        {"input_ids": TOKENS, "attention_mask": None, "past_key_values": None, "labels": None},
    ),
    "a masked model": (MASKED, {"input_ids": TOKENS, "attention_mask": None, "labels": None}),
    "backward_through_time": (
        performers.backward_through_time,
        {"model": CAUSAL, "input_ids": TOKENS, "chunk_length": 3, "labels": None},
    ),
    "restore": (performers.restore, {"model": LLAMA}),
    "calibrate": (
        performers.calibrate,
        {"model": performers.linearize(LLAMA), "batches": [{"input_ids": TOKENS}] * 2},
    ),
    "random features": (
        lambda **given: RandomKernelFeatures(n_components=6, **given).fit_transform(ROWS),
        {"kernel": "rbf", "gamma": 0.5, "projection": "iid", "distribution": "gaussian"},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_another_kind_of_thing_is_served_or_refused_by_name(entrance):
    function, arguments = ENTRANCES[entrance]
    faults = []
    for name in arguments:
        for kind, thing in OTHERS.items():
            # A function of the caller's has errors of its own.
            if name == "distribution" and callable(thing):
                continue
            try:
                outcome(lambda given={name: thing}: function(**{**arguments, **given}))
            except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
                faults.append(f"{name}={kind}: {error!r:.200}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("auto_class", [None, "LlamaForCausalLM", len, torch.zeros(2)])
def test_a_class_that_loads_nothing_is_refused_by_name(auto_class, tmp_path):
    with pytest.raises(TypeError, match="auto_class must be a class with from_pretrained"):
        performers.load_linearized(auto_class, tmp_path)


@pytest.mark.parametrize("path", [None, 3, b"x"])
def test_a_path_that_is_none_is_refused_by_name(path):
    with pytest.raises(TypeError, match="path must be the path of a folder, got"):
        performers.load_linearized(LlamaForCausalLM, path)
