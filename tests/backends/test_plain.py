"""Causal attention as one formula, which transforms of torch.func go through."""

import pytest
import torch
from cases import FEATURE_MAPS, inputs

from performers import favor_attention


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_a_single_projection_is_batched_as_it_is_computed(name):
    phi = FEATURE_MAPS[name](5, 1)
    tensors = inputs(19, key_heads=6)

    def one(*tensors):
        return favor_attention(*(x.unsqueeze(0) for x in tensors), phi, True, normalize=False)[0]

    expected = favor_attention(*tensors, phi, True, normalize=False, backend="reference")
    found = torch.func.vmap(one)(*tensors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
