"""A new estimator or kernel is one row, and the contract holds it to what the row says."""

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from contract import test_mechanisms as contract
from torch import Tensor

from performers import KernelFeatures, SoftmaxFeatures, diagnose, favor_attention
from performers.kernels import KERNELS, Kernel
from performers.nn import RandomFeatures
from performers.nn.estimators import ESTIMATORS, Estimator
from performers.typing import Features

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def exponentials(x: Tensor, omega: Tensor) -> Features:
    """exp(ω·x − ‖x‖²/2) / √m"""
    log_values = x @ omega.to(x.dtype).mT - math.log(len(omega)) / 2
    return Features(log_values=log_values, log_rows=-x.square().sum(dim=-1, keepdim=True) / 2)


def of_all_positions(x: Tensor, omega: Tensor) -> Features:
    """Features of a row that know the other rows."""
    return exponentials(x - x.mean(dim=-2, keepdim=True), omega)


def estimated(dim: int, num_projections: int) -> SoftmaxFeatures:
    return SoftmaxFeatures(dim, num_projections, estimator="toy")


def kernelized(dim: int, num_projections: int) -> KernelFeatures:
    return KernelFeatures(dim, num_projections, fn="toy")


def hold_to_contract(feature_map: Callable[[int, int], RandomFeatures]) -> None:
    """Every test of the contract, for attention that averages: one shape, in both directions."""
    tests = [test for name, test in vars(contract).items() if name.startswith("test_")]
    assert tests
    given = {"dtype": torch.float32, "shape": [2, 3, 13, 5, 7], "group": 2}
    for backend, is_causal in itertools.product(("reference", "chunked", None), (False, True)):
        attend = contract._favor(feature_map, backend=backend)
        given["mechanism"] = contract.Mechanism(attend, is_average=True)
        for test in tests:
            once = test.hypothesis.inner_test  # for these arguments alone
            names = inspect.signature(once).parameters
            once(**{name: (given | {"is_causal": is_causal})[name] for name in names})


def assert_attends_as_defined(phi: RandomFeatures) -> None:
    """Both directions, with the products of all pairs of features."""
    query, key, value = torch.randn(3, 2, 3, 13, 5).unbind()
    of_query, of_key = (
        phi.query_features(x * phi.default_scale**0.5).dense() for x in (query, key)
    )
    matrix = of_query @ of_key.mT
    for is_causal in (False, True):
        seen = matrix.tril() if is_causal else matrix
        expected = seen @ value / seen.sum(dim=-1, keepdim=True)
        out = favor_attention(query, key, value, phi, is_causal)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_an_estimator_of_one_function_and_one_row_attends_both_ways_and_is_diagnosed(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(exponentials, is_nonnegative=True))
    hold_to_contract(estimated)
    phi = estimated(5, 1009)
    assert_attends_as_defined(phi)
    tensors = torch.randn(3, 1, 2, 13, 5).unbind()
    found = diagnose(*tensors, phi, is_causal=True, target_error=0.5, max_projections=11)
    like = diagnose(
        *tensors, SoftmaxFeatures(5, 1009), is_causal=True, target_error=0.5, max_projections=11
    )
    for toy, positive in zip(found.heads, like.heads, strict=True):
        assert toy.observed_error == pytest.approx(positive.observed_error, rel=1e-3)
        assert toy.smallest_projections == positive.smallest_projections
        assert (toy.expected_error, toy.predicted_projections) == (None, None)


def test_a_kernel_of_one_row_attends_both_ways(monkeypatch):
    monkeypatch.setitem(KERNELS, "toy", Kernel(torch.square, is_nonnegative=True))
    hold_to_contract(kernelized)
    assert_attends_as_defined(kernelized(5, 11))


def test_a_wrong_estimator_breaks_the_contract(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(of_all_positions, is_nonnegative=True))
    with pytest.raises(AssertionError):
        hold_to_contract(estimated)


@pytest.mark.parametrize(
    "row",
    [
        Kernel(lambda x: (x - x.mean(dim=-2, keepdim=True)).square(), is_nonnegative=True),
        Kernel(torch.sin, is_nonnegative=True),
    ],
    ids=["other positions", "signs"],
)
def test_a_wrong_kernel_breaks_the_contract(monkeypatch, row):
    monkeypatch.setitem(KERNELS, "toy", row)
    with pytest.raises(AssertionError):
        hold_to_contract(kernelized)
