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
