"""A row of ESTIMATORS says of its features what they are."""

import pytest
import torch

from performers.functional import positive_features, trigonometric_features
from performers.functional.features import positive_side
from performers.nn.estimators import ESTIMATORS, Estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_width_signs_and_sides_are_those_of_the_features(estimator):
    row = ESTIMATORS[estimator]
    x, omega = torch.randn(13, 5), torch.randn(11, 5)
    phi = row.features(x, omega).dense()
    assert phi.shape == (13, 11 * row.features_per_projection)
    assert bool((phi @ phi.mT >= 0).all()) == row.is_nonnegative
    if row.side is not None:
        torch.testing.assert_close(row.side(omega).log_linear(x).features().dense(), phi)


@pytest.mark.parametrize(
    "row",
    [
        Estimator(positive_features),
        Estimator(positive_features, features_per_projection=2, is_nonnegative=True),
        Estimator(trigonometric_features, features_per_projection=2, is_nonnegative=True),
        Estimator(
            lambda x, omega: positive_features(2 * x, omega),
            is_nonnegative=True,
            side=positive_side,
        ),
    ],
    ids=["signs", "width", "positivity", "side"],
)
def test_a_row_that_says_otherwise_is_seen(monkeypatch, row):
    monkeypatch.setitem(ESTIMATORS, "toy", row)
    with pytest.raises(AssertionError):
        test_width_signs_and_sides_are_those_of_the_features("toy")
