"""A new estimator, kernel or mechanism is one row, and the contract holds it to what is said."""

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from contract import test_mechanisms as contract
from torch import Tensor, nn

from performers import KernelFeatures, SoftmaxFeatures, diagnose, favor_attention
from performers.kernels import KERNELS, Kernel
from performers.models import MECHANISMS, PerformerConfig, PerformerForCausalLM
from performers.models.mechanisms import Mechanism
from performers.models.memory import KeysAndValues
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


def hold_to_contract(build: Callable[[int], Callable[..., Tensor]]) -> None:
    """Every test of the contract, for attention that averages: one shape, in both directions."""
    tests = [test for name, test in vars(contract).items() if name.startswith("test_")]
    assert tests
    given = {
        "mechanism": contract.Mechanism(build, is_average=True),
        "dtype": torch.float32,
        "shape": [2, 3, 13, 5, 7],
        "group": 2,
    }
    for test, is_causal in itertools.product(tests, (False, True)):
        once = test.hypothesis.inner_test  # for these arguments alone
        names = inspect.signature(once).parameters
        once(**{name: (given | {"is_causal": is_causal})[name] for name in names})


def hold_features_to_contract(feature_map: Callable[[int, int], RandomFeatures]) -> None:
    for backend in ("reference", "chunked", None):
        hold_to_contract(contract._favor(feature_map, backend=backend))


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
    hold_features_to_contract(estimated)
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
    hold_features_to_contract(kernelized)
    assert_attends_as_defined(kernelized(5, 11))


def test_a_wrong_estimator_breaks_the_contract(monkeypatch):
    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(of_all_positions, is_nonnegative=True))
    with pytest.raises(AssertionError):
        hold_features_to_contract(estimated)


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
        hold_features_to_contract(kernelized)


class Averages(nn.Module):
    """The mean of the visible values."""

    def __init__(self, obeys: tuple[str, ...] = ("is_causal", "key_padding_mask")) -> None:
        super().__init__()
        self.obeys = obeys

    def forward(self, query, key, value, *, is_causal=False, key_padding_mask=None) -> Tensor:
        visible = value.new_ones(query.shape[2], key.shape[2])
        if is_causal and "is_causal" in self.obeys:
            visible = visible.tril()
        if key_padding_mask is not None and "key_padding_mask" in self.obeys:
            visible = visible * key_padding_mask[:, None, None]
            value = value.masked_fill(~key_padding_mask[:, None, :, None], 0)
        value = value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        return visible @ value / visible.sum(dim=-1, keepdim=True).clamp(min=1)


def built(dim: int) -> Callable[..., Tensor]:
    """The mechanism of the row "toy", with the arguments of the contract."""
    config = PerformerConfig(attention="toy", hidden_size=8 * dim, position="learned")
    mechanism = MECHANISMS[config.attention].build(config, 0)

    def attend(query: Tensor, key: Tensor, value: Tensor, *masks: object) -> Tensor:
        given = dict(zip(("is_causal", "key_padding_mask"), masks, strict=False))
        return mechanism(query, key, value, **given)

    return attend


def test_a_mechanism_of_one_row_attends_both_ways_and_generates(monkeypatch):
    row = Mechanism(lambda config, layer: Averages(), memory=KeysAndValues)
    monkeypatch.setitem(MECHANISMS, "toy", row)
    hold_to_contract(built)
    config = PerformerConfig(
        attention="toy", hidden_size=24, num_attention_heads=3, num_hidden_layers=2
    )
    model, prompt = PerformerForCausalLM(config).eval(), torch.randint(1, 31, (2, 5))
    written, again = (
        model.generate(prompt, do_sample=False, max_new_tokens=7, use_cache=cache)
        for cache in (True, False)
    )
    assert written.shape == (2, 12)
    assert torch.equal(written, again)


@pytest.mark.parametrize("obeyed", ["is_causal", "key_padding_mask"])
def test_a_wrong_mechanism_breaks_the_contract(monkeypatch, obeyed):
    row = Mechanism(lambda config, layer: Averages((obeyed,)), memory=KeysAndValues)
    monkeypatch.setitem(MECHANISMS, "toy", row)
    with pytest.raises(AssertionError):
        hold_to_contract(built)
