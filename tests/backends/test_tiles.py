"""What is computed again in the backward pass, and when."""

import pytest
import torch
from torch.autograd import forward_ad

from performers.backends.tiles import recomputed


@pytest.mark.parametrize("is_enabled", [False, True])
def test_a_tile_is_computed_again_only_for_its_gradient(is_enabled):
    calls, x = [], torch.randn(7, requires_grad=True)

    def tile(x):
        calls.append(x)
        return x.sin().exp()

    with torch.set_grad_enabled(is_enabled):
        out = recomputed(tile, x)
    torch.testing.assert_close(out, x.sin().exp())
    assert len(calls) == 1
    if is_enabled:
        out.sum().backward()
        torch.testing.assert_close(x.grad, x.cos() * x.sin().exp())
        assert len(calls) == 2


def test_transforms_keep_what_a_tile_has_computed():
    calls = []

    def tile(x):
        calls.append(x)
        return x.sin()

    x = torch.randn(7)
    found = torch.func.grad(lambda x: recomputed(tile, x).sum())(x)
    torch.testing.assert_close(found, x.cos())
    with forward_ad.dual_level():
        recomputed(tile, x)
    assert len(calls) == 2
