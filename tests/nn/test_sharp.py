"""`SharpFeatures` as a module: what calibration leaves in it, and what its choices leave out."""

import pytest
import torch
from oracle import log_sharp_features

from performers import SharpFeatures


def tensors():
    """Queries and keys of cross-attention, two query heads to a key head, away from the origin."""
    query = torch.randn(2, 6, 11, 5) * torch.linspace(0.5, 1.5, 5) + 0.4
    return query, torch.randn(2, 3, 7, 5) - 0.3


def calibrated(query, key, **options):
    phi = SharpFeatures(5, 13, num_heads=3, **options)
    phi.calibrate(query, key)
    return phi


def test_there_may_be_fewer_keys_than_queries_which_count_alike():
    query, key = tensors()
    phi = calibrated(query, key)
    rows = query.double().unflatten(1, (3, 2)).transpose(0, 1).flatten(1, 3)
    torch.testing.assert_close(phi.query_count, torch.full((3,), 44.0, dtype=torch.float64))
    torch.testing.assert_close(phi.query_mean, rows.mean(dim=1) * 5**-0.25)


@pytest.mark.parametrize(
    "left_out", [{}, {"shift": False}, {"balance": False}, {"optimal": "none"}], ids=str
)
def test_each_step_is_taken_unless_it_is_left_out(left_out):
    phi = calibrated(*tensors(), **left_out)
    for shift in (phi.query_shift, phi.key_shift):
        assert bool(shift.any()) == left_out.get("shift", True)
    is_diagonal = all(
        torch.equal(x, x.diagonal(dim1=-2, dim2=-1).diag_embed())
        for x in (phi.query_map, phi.key_map)
    )
    assert is_diagonal != left_out.get("balance", True)
    assert bool(phi.exponent.any()) == (left_out.get("optimal") != "none")


def test_queries_and_keys_have_the_features_of_the_formula():
    query, key = tensors()
    phi = calibrated(query, key)
    rows, keys = query[:, ::2].double() * 0.7, key.double() * 0.7
    found = phi.query_features(rows).exponent(), phi.key_features(keys).exponent()
    torch.testing.assert_close(found, log_sharp_features(rows, keys, phi))
    assert (phi.num_features, phi.default_scale) == (13, 5**-0.5)
    assert phi.is_softmax is phi.is_nonnegative is phi.is_log_linear is True
