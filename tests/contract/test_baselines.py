"""What the contract asks of the mechanisms of the registry beyond its laws."""

import pytest
import torch
from contract.test_mechanisms import MECHANISMS, ROWS, draw
from mechanisms import BASELINES

from performers.models import MECHANISMS as ALL
from performers.models import PerformerConfig


def test_every_mechanism_of_the_registry_is_under_the_contract():
    features = {name for name in ROWS if name.startswith("performer-")}  # all are in FEATURE_MAPS
    assert set(ROWS) - features == {"exact", *BASELINES}


@pytest.mark.parametrize("name", [name for name in BASELINES if name in MECHANISMS])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_outputs_and_gradients_are_finite_at_any_norm(name, is_causal, size):
    query, key, value = (x.requires_grad_() for x in draw([2, 3, 13, 5, 7], 2, torch.float32))
    is_causal = is_causal and MECHANISMS[name].has_causal
    out = MECHANISMS[name].build(5)(size * query, size * key, value, is_causal)
    out.square().sum().backward()
    for x in (out, query.grad, key.grad, value.grad):
        assert x is None or x.isfinite().all()


def test_every_mechanism_says_the_cost_that_its_paper_promises():
    assert all("L" in row.cost for name, row in ALL.items() if name != "identity")
    assert ALL["identity"].cost == "none"


@pytest.mark.parametrize(
    ("name", "is_causal"),
    [
        (name, is_causal)
        for name in BASELINES
        for is_causal in (False, True)
        if name in MECHANISMS and (MECHANISMS[name].has_causal or not is_causal)
    ],
)
def test_a_sequence_of_any_length_is_itself_beside_padding_on_either_side(name, is_causal):
    """Below, at and beyond the blocks, chunks and windows that models have by default."""
    config = PerformerConfig(
        attention=name,
        hidden_size=5,
        num_attention_heads=1,
        num_projections=17,
        position="learned",
        max_position_embeddings=137,
    )
    attend = ROWS[name].build(config, 0)
    lengths, position = torch.tensor([[1], [2], [17], [63], [65], [129]]), torch.arange(137)
    mask = torch.cat([position < lengths, position >= len(position) - lengths])
    tensors = draw([len(mask), 1, len(position), 5, 7], 1, torch.float32)
    out = attend(*tensors, is_causal=is_causal, key_padding_mask=mask)
    for row, real in enumerate(mask):
        alone = attend(*(x[row : row + 1, :, real] for x in tensors), is_causal=is_causal)
        torch.testing.assert_close(out[row : row + 1, :, real], alone, rtol=1e-4, atol=1e-5)
