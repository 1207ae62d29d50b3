"""torch.export and AOTInductor: one graph of a whole model serves every batch and length."""

from pathlib import Path

import pytest
from warm import warm_python

# In a fresh process, because checks of shapes tie a graph to the sizes that they have seen.
CODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import tiny_models
import torch
from performers import FavorOptions, PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers import linearize

torch.manual_seed(0)


def performer(model_class, attention):
    return model_class(PerformerConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=41, num_projections=17, initializer_range=0.3, attention=attention,
    )).eval()


def inputs_of(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    return {{"input_ids": torch.randint(5, 31, (batch, length)), "attention_mask": mask}}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        model.config.use_cache = False

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def exported(model, most):
    sizes = {{0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=most)}}
    inputs = inputs_of(2, 23)
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes))


def check(model, found, lengths):
    for batch, length in enumerate(lengths, start=1):
        inputs = inputs_of(batch, length)
        with torch.no_grad():
            expected = model(**inputs)
        torch.testing.assert_close(found(**inputs), expected, rtol=1e-4, atol=1e-5)


"""
EXPORTED = """
model = Logits({model})
check(model, exported(model, {most}).module(), {lengths})
"""
COMPILED = """
model = Logits({model})
package = torch._inductor.aoti_compile_and_package(
    exported(model, {most}), package_path={path!r}
)
check(model, torch._inductor.aoti_load_package(package), {lengths})
"""

# Each with its longest input: a BERT has a table of positions.
BERT, LLAMA = (
    "linearize(tiny_models.bert(), {options})",
    "linearize(tiny_models.llama(), {options})",
)
MODELS = {
    "masked": ('performer(PerformerForMaskedLM, "performer-relu")', None),
    "causal": ('performer(PerformerForCausalLM, "performer-positive")', None),
    "bert": (BERT.format(options="FavorOptions(17)"), 512),
    "bert, far alone": (BERT.format(options="FavorOptions(17, window_size=None)"), 512),
    "llama": (LLAMA.format(options="FavorOptions(17)"), None),
    "gpt2": ("linearize(tiny_models.gpt2(), FavorOptions(17))", 512),
    "llama, one head exact": (
        LLAMA.format(options="FavorOptions(17, window_size=3, exact_heads={1: [0]})"),
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_serves_every_batch_and_length(name):
    model, most = MODELS[name]
    lengths = (2, 131, 512 if most else 1201)
    warm_python(CODE + EXPORTED.format(model=model, most=most, lengths=lengths))


PACKED = """
model = {model}
model.config.use_cache = False
positions = torch.arange(23).expand(1, -1)
given = {{"input_ids": torch.randint(31, (1, 23)), "position_ids": positions}}
length = dict.fromkeys(given, {{1: torch.export.Dim("length", min=2)}})
with torch.no_grad():
    exported = torch.export.export(model.eval(), (), given, dynamic_shapes=length).module()
    torch.testing.assert_close(exported(**given)[0], model(**given)[0])
    try:
        exported(**given | {{"position_ids": positions % 7}})
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODELS["llama"][0], MODELS["gpt2"][0]])
def test_an_exported_model_refuses_positions_that_restart(model):
    refusal = warm_python(CODE + PACKED.format(model=model))
    assert refusal.startswith("positions that restart pack several sequences into a row")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "bert"])
def test_a_model_compiled_ahead_of_time_serves_every_batch_and_length(name, tmp_path):
    model, most = MODELS[name]
    path = str(tmp_path / "model.pt2")
    code = COMPILED.format(model=model, most=most, lengths=(2, 131, 512), path=path)
    warm_python(CODE + code)
