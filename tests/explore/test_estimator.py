"""Estimates on the page have the mean and the variance that theory says."""

import pytest
import torch

from performers.explore.estimator import CHOICES, CLOSED_FORMS, DIMS, estimates, pair, summary
from performers.functional.projections import PROJECTIONS

WORDS = {row: word for word, row in CHOICES.items()}


@pytest.mark.parametrize("row", CLOSED_FORMS, ids=" ".join)
def test_lemma_2_and_its_kin_are_the_variance_of_what_is_drawn(row):
    word, projection = WORDS[row[:2]], row[2]
    found = estimates(0.7, 0.5, 75.0, 8, 11, projection, word, draws=2000, seed=1)
    assert found.closed_form == pytest.approx(found.variance, abs=4 * found.standard_error)
    error = (found.closed_form / 2000) ** 0.5
    assert found.expected == pytest.approx(float(found.values.mean()), abs=4 * error)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_rows_of_one_estimate_are_orthogonal_and_those_of_two_are_not(projection, monkeypatch):
    drawn = []

    def features(x, omega):
        drawn.append(omega)
        return original(x, omega)

    from performers.explore import estimator

    original = estimator.ESTIMATORS["positive"].features
    row = estimator.ESTIMATORS["positive"]._replace(features=features)
    monkeypatch.setitem(estimator.ESTIMATORS, "positive", row)
    dim, m = DIMS[-1], 37
    estimates(1.0, 1.0, 0.0, dim, m, projection, "positive", draws=3)
    first, second, _ = drawn[0].unflatten(0, (3, m))
    normal = torch.nn.functional.normalize
    first, second = normal(first[:dim], dim=1), normal(second[:dim], dim=1)
    inside = first @ first.T - torch.eye(dim)
    across = first @ second.T
    assert across.abs().max() > 1e-3
    assert (inside.abs().max() < 1e-5) == (projection != "iid")


def test_the_two_vectors_have_their_lengths_and_their_angle():
    x, y = pair(2.0, 3.0, 60.0, 4)
    assert x.norm() == pytest.approx(2)
    assert y.norm() == pytest.approx(3)
    assert x @ y == pytest.approx(2 * 3 / 2)


def test_where_the_paper_has_no_formula_the_page_says_so():
    found = estimates(0.5, 0.5, 90.0, 4, 3, "givens", "trigonometric", draws=7)
    assert found.closed_form is None
    assert "| variance | none in the paper |" in summary(found)
