"""torch.compile: the same output and gradients, in one graph."""

import pytest

# In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
CODE = """
import torch
from performers.models import PerformerConfig, {model_class}

config = PerformerConfig(
    vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
    intermediate_size=41, num_projections=17, attention={attention!r}, initializer_range=0.3,
)
torch.manual_seed(3)
model = {model_class}(config).eval()
tokens = torch.randint(31, (3, 11))
expected = model(tokens, labels=tokens)
expected.loss.backward()
weight = model.performer.layers[0].attention.q_proj.weight
gradient, weight.grad = weight.grad, None
out = torch.compile(model, fullgraph=True)(tokens, labels=tokens)
out.loss.backward()
torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_class", ["PerformerForMaskedLM", "PerformerForCausalLM"])
@pytest.mark.parametrize("attention", ["performer-relu", "performer-positive"])
def test_a_compiled_model_is_the_same_model(fresh_python, model_class, attention):
    fresh_python(CODE.format(model_class=model_class, attention=attention))
