"""What the definition is made of."""

import math

import pytest
import torch

from performers.backends.reference import Partial

# Sums of weights near and far, and what remains of the far ones where they may be twice the near.
LIMITED = [(2.0, 8.0, 4.0), (2.0, 4.0, 4.0), (2.0, 1.0, 1.0), (2.0, 0.0, 0.0), (0.0, 3.0, 3.0)]


@pytest.mark.parametrize("frame", [-30.0, 0.0, 5.0])
@pytest.mark.parametrize(("near", "far", "remains"), LIMITED)
def test_far_weights_are_at_most_a_multiple_of_the_near_ones(near, far, remains, frame):
    def partial(total, frame):
        normalizer = torch.full((1, 1), total, dtype=torch.float64, requires_grad=True)
        numerator = normalizer * torch.tensor([[3.0, -7.0]])
        return normalizer, Partial(numerator, normalizer, torch.full((1, 1), frame).double())

    _, of_near = partial(near, 1.0)
    leaf, of_far = partial(far * math.exp(1.0 - frame), frame)
    found, log_factor = of_far.limited(of_near, 2.0)
    total = found.normalizer * (found.frame - 1.0).exp()
    assert total.item() == pytest.approx(remains, abs=1e-12)
    torch.testing.assert_close(found.numerator, 3 * found.normalizer * torch.tensor([[1, -7 / 3]]))
    assert log_factor.exp().item() == pytest.approx(remains / far if far else 1.0)
    (slope,) = torch.autograd.grad(found.normalizer.sum(), leaf)
    assert slope.isfinite().all()
