"""Features of generalized kernels are the values of their functions, with ε and over √m."""

import pytest
import torch

from performers.functional import KERNELS, kernel_features


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
@pytest.mark.parametrize("fn", KERNELS)
def test_features_of_a_kernel_are_its_values_plus_epsilon(fn, epsilon):
    x, omega = torch.randn(3, 5).double(), torch.randn(11, 5).double()
    row = KERNELS[fn]

    def values(projected):
        found = row.fn(projected)
        return (found.exp() if row.is_exponential else found) + epsilon

    torch.testing.assert_close(
        kernel_features(x, omega, fn, epsilon).dense(), values(x @ omega.mT) / 11**0.5
    )
    torch.testing.assert_close(kernel_features(x, None, fn, epsilon).dense(), values(x))


def test_elu_plus_one_keeps_its_digits_far_below_0():
    x = torch.linspace(-80, 3, 83, dtype=torch.float64, requires_grad=True)
    values = KERNELS["elu+1"].fn(x.float())
    torch.testing.assert_close(
        values.double(), torch.where(x > 0, x + 1, x.exp()), rtol=1e-5, atol=0
    )
    (gradient,) = torch.autograd.grad(values.sum(), x)
    expected = KERNELS["elu+1"].backward(torch.ones_like(x), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
