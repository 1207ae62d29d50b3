"""torch.compile(fullgraph=True) and torch.export: one graph, for lengths that change as well."""

import pytest
from warm import warm_python

# In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
CODE = """
import warnings
import torch
from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures, favor_attention

warnings.simplefilter("ignore")  # of features that can be negative

torch.manual_seed(0)
PHI = {phi}
if isinstance(PHI, SharpFeatures):
    PHI.calibrate(torch.randn(1, 4, 50, 5), torch.randn(1, 4, 50, 5))


def inputs(length, batch=2):
    return torch.randn(3, batch, 4, length, 5).requires_grad_().unbind()


def attend(query, key, value):
    return favor_attention(query, key, value, PHI, **{words})


class Attend(torch.nn.Module):
    def forward(self, query, key, value):
        return attend(query, key, value)

"""

COMPILED = """
compiled = torch.compile(attend, fullgraph=True, dynamic={is_dynamic})
for length in (23, 37):
    tensors = inputs(length)
    out, expected = compiled(*tensors), attend(*tensors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    both = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected))
    for one, other in zip(*both):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
"""

EXPORTED = """
shapes = [{{0: torch.export.Dim("batch"), 2: torch.export.Dim("length", min=2)}}] * 3
exported = torch.export.export(Attend(), inputs(23), dynamic_shapes=shapes).module()
for length in (23, 1201):  # more than two tiles of keys
    tensors = inputs(length, batch=3)
    out, expected = exported(*tensors), attend(*tensors)
    torch.testing.assert_close(out, expected)
    both = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected))
    for one, other in zip(*both):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
"""

HEADS = "SharpFeatures(5, 11, num_heads=4)"
WORDS = [
    {},
    {"backend": "chunked"},
    {"is_causal": True},
    {"window_size": 3},
    {"window_size": 3, "is_causal": True},
]
# Features that are computed tile by tile, and have numbers of their own.
TILES = {
    "callable": "KernelFeatures(5, 11, lambda x: (1.5 * x).sigmoid())",
    "exp": 'KernelFeatures(5, 11, "exp")',
    "trigonometric": 'SoftmaxFeatures(5, 11, estimator="trigonometric")',
}


@pytest.mark.slow
@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("phi", ["SoftmaxFeatures(5, 11)", HEADS])
def test_attention_compiles_whole(phi, words, is_dynamic):
    warm_python((CODE + COMPILED).format(phi=phi, words=words, is_dynamic=is_dynamic))


@pytest.mark.slow
@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "is_causal"),
    [("callable", False), ("callable", True), ("exp", False), ("trigonometric", False)],
)
def test_features_without_an_operator_compile_whole(name, is_causal, is_dynamic):
    words = {"is_causal": is_causal}
    warm_python((CODE + COMPILED).format(phi=TILES[name], words=words, is_dynamic=is_dynamic))


@pytest.mark.slow
@pytest.mark.parametrize("words", WORDS, ids=str)
@pytest.mark.parametrize("phi", ["SoftmaxFeatures(5, 11)", HEADS])
def test_attention_exports_with_a_dynamic_length(phi, words):
    warm_python((CODE + EXPORTED).format(phi=phi, words=words))
