"""The closed form of attention's error is what a simulation finds, and contains Lemma 2."""

import pytest
import torch
from standard_errors import assert_mean_within
from torch import Tensor

from performers import SoftmaxFeatures, draw_projection, theory
from performers.functional.sharp import Reparametrization, ReparametrizedFeatures
from performers.nn.estimators import ESTIMATORS
from performers.typing import FeatureMap

# Of the estimators that have one, by the names of their rows.
JOINT_MOMENTS = {
    name: row.log_joint_moment for name, row in ESTIMATORS.items() if row.log_joint_moment
}
PARAMETER = torch.tensor([-0.05, -0.3, 0.01, 0.0, 0.02], dtype=torch.float64)
M, DRAWS = 512, 1009


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    """One query, seven keys and values."""
    query, key, value = torch.randn(5), torch.randn(7, 5), torch.randn(7, 3)
    return 0.25 * query.double(), 0.25 * key.double(), value.double()


def squared_errors(
    phi: FeatureMap, query: Tensor, key: Tensor, value: Tensor, is_exact: Tensor
) -> Tensor:
    """‖estimated − exact output‖² with each M rows of ω for themselves."""
    terms = phi.query_features(query[None]).dense() * phi.key_features(key).dense()
    # Hyperbolic and trigonometric features are two of a projection, in two halves.
    kernel = terms.unflatten(-1, (-1, DRAWS, M)).sum(dim=(1, 3)).mT * DRAWS  # (draws, keys)
    exact = (key @ query).exp()
    kernel = torch.where(is_exact, exact, kernel)
    out = kernel @ value / kernel.sum(dim=-1, keepdim=True)
    return (out - exact @ value / exact.sum()).square().sum(dim=-1)


@pytest.mark.parametrize("num_exact", [0, 3])
@pytest.mark.parametrize("estimator", [*JOINT_MOMENTS, "optimal"])
def test_the_error_of_the_output_is_the_closed_form(estimator, num_exact):
    query, key, value = vectors()
    omega = draw_projection(M * DRAWS, 5, "iid")
    if estimator == "optimal":
        identity = Reparametrization.identity(dim=5)._replace(exponent=PARAMETER)
        phi = ReparametrizedFeatures(omega, identity)
        moment = theory.log_joint_moment_optimal(query, key, PARAMETER)
    else:
        phi = SoftmaxFeatures(5, 1, estimator)
        phi.omega = omega
        moment = JOINT_MOMENTS[estimator](query, key)
    is_exact = torch.arange(7) < num_exact
    log_weights = (key @ query).log_softmax(dim=-1)
    expected = theory.mse_attention(log_weights, value, moment, M, is_exact)
    assert_mean_within(squared_errors(phi, query, key, value, is_exact), float(expected))


@pytest.mark.parametrize("estimator", JOINT_MOMENTS)
def test_the_diagonal_of_the_joint_moment_is_lemma_2(estimator):
    query, key, _ = vectors()
    relative = JOINT_MOMENTS[estimator](query, key).diagonal().expm1()
    mean_squared_error = getattr(theory, f"mse_{estimator}")
    expected = mean_squared_error(query.expand(7, 5), key, 1) / (2 * (key @ query)).exp()
    torch.testing.assert_close(relative, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("parameter", [-0.3, 0.0, 0.1])
def test_one_parameter_for_all_coordinates_is_that_of_optimal_features(parameter):
    query, key, _ = vectors()
    moment = theory.log_joint_moment_optimal(query, key, torch.full((5,), parameter).double())
    expected = theory.mse_optimal_positive(query.expand(7, 5), key, 1, parameter)
    expected = expected / (2 * (key @ query)).exp()
    torch.testing.assert_close(moment.diagonal().expm1(), expected, rtol=1e-6, atol=1e-9)
    if parameter == 0.0:
        torch.testing.assert_close(moment, theory.log_joint_moment_positive(query, key))


def test_an_error_that_all_keys_share_cancels():
    query, _, value = vectors()
    key = query.new_full((7, 5), 0.7)  # one key seven times: whatever φ is, the mean of the values
    log_weights = (key @ query).log_softmax(dim=-1)
    moment = theory.log_joint_moment_positive(query, key)
    assert theory.mse_attention(log_weights, value, moment, 1) < 1e-12
    assert (moment.diagonal().expm1() > 1).all()


def test_exact_keys_alone_leave_no_error_and_masked_ones_no_trace():
    query, key, value = vectors()
    moment = theory.log_joint_moment_positive(query, key)
    visible = torch.arange(7) < 4
    scores = (key @ query).masked_fill(~visible, -torch.inf)
    masked = theory.mse_attention(scores.log_softmax(-1), value, moment, 5)
    alone = theory.mse_attention(scores[:4].log_softmax(-1), value[:4], moment[:4, :4], 5)
    torch.testing.assert_close(masked, alone)
    assert theory.mse_attention(scores.log_softmax(-1), value, moment, 5, visible) == 0


def test_features_without_variance_make_no_error():
    query, key, value = vectors()
    log_weights = (key @ query).log_softmax(dim=-1)
    no_variance = torch.zeros(7, 7, dtype=torch.float64)  # J = 1
    for num_exact in (0, 3):
        is_exact = torch.arange(7) < num_exact
        assert theory.mse_attention(log_weights, value, no_variance, 1, is_exact) < 1e-12
