"""torch.onnx.export: onnxruntime computes what PyTorch does, for every batch and length."""

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]

# In a fresh process, because checks of shapes tie a graph to the sizes that they have seen.
EXPORTED = """
import onnxruntime, torch

def check(model, inputs_of, sizes):
    "The model in onnxruntime, on other inputs than those of the export."
    inputs = inputs_of(2, 13)
    program = torch.onnx.export(
        model.eval(), kwargs=inputs, dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch, length in ((1, 1), (2, 16), (3, 131)):
        inputs = inputs_of(batch, length)
        found = session.run(None, {name: x.numpy() for name, x in inputs.items()})[0]
        with torch.no_grad():
            expected = model(**inputs)
        expected = expected if isinstance(expected, torch.Tensor) else expected[0]
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)

def padding(batch, length):
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, : length // 3] = 0
    mask[-1, length - length // 4 :] = 0
    return mask

torch.manual_seed(0)
"""

ATTENTION = """
from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures, favor_attention

class Attend(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.phi = {phi}
        if isinstance(self.phi, SharpFeatures):
            self.phi.calibrate(torch.randn(1, 4, 50, 5), torch.randn(1, 4, 50, 5))

    def forward(self, query, key, value, mask):
        return favor_attention(query, key, value, self.phi, key_padding_mask=mask, **{words})

def inputs_of(batch, length):
    tensors = zip(("query", "key", "value"), torch.randn(3, batch, 4, length, 5))
    return dict(tensors) | {{"mask": padding(batch, length).bool()}}

sizes = {{name: {{0: "batch", 2: "length"}} for name in ("query", "key", "value")}}
check(Attend(), inputs_of, sizes | {{"mask": {{0: "batch", 1: "length"}}}})
"""

TEXT = """
import sys
sys.path.insert(0, {tests!r})
import tiny_models
from performers import (
    FavorOptions, PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM, linearize
)

def performer(model_class, attention):
    return model_class(PerformerConfig(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=41, num_projections=17, initializer_range=0.3, attention=attention,
        use_cache=False,
    ))

def inputs_of(batch, length):
    ids = torch.randint(5, 31, (batch, length))
    return {{"input_ids": ids, "attention_mask": padding(batch, length)}}

model = {model}
check(model, inputs_of, dict.fromkeys(("input_ids", "attention_mask"), {{0: "batch", 1: "length"}}))
"""

WORDS = [{}, {"is_causal": True}]


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("phi", ["SoftmaxFeatures(5, 11)", "SharpFeatures(5, 11, num_heads=4)"])
def test_attention_in_onnxruntime_is_that_of_torch(fresh_python, phi, words):
    fresh_python(EXPORTED + ATTENTION.format(phi=phi, words=words))


@pytest.mark.slow
@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_features_in_onnxruntime_are_those_of_torch(fresh_python, is_causal):
    words = {"is_causal": is_causal}
    fresh_python(EXPORTED + ATTENTION.format(phi="KernelFeatures(5, 11)", words=words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        'performer(PerformerForMaskedLM, "performer-positive")',
        'performer(PerformerForCausalLM, "performer-relu")',
    ],
)
def test_a_model_in_onnxruntime_is_that_of_torch(fresh_python, model):
    fresh_python(EXPORTED + TEXT.format(tests=str(ROOT / "tests"), model=model))


@pytest.mark.slow
def test_the_page_about_export_exports(fresh_python, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = MarkdownIt().parse((ROOT / "docs/export.md").read_text(encoding="utf-8"))
    block = next(token for token in page if token.info.strip() == "python")
    fresh_python(block.content)
