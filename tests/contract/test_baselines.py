"""What the contract asks of the mechanisms of the registry beyond its laws."""

import pytest
import torch
from contract.test_mechanisms import MECHANISMS, ROWS, draw
from mechanisms import BASELINES

from performers.models import MECHANISMS as ALL


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
