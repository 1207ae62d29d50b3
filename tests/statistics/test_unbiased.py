"""Feature maps estimate their kernels without bias, whatever the direction of their arguments.

Along e₁ and along (1, …, 1)/√d an orthogonal draw with a convention of sign in it shows its bias.
"""

import math

import pytest
import torch
from standard_errors import assert_mean_within
from torch import Tensor

from performers import draw_projection
from performers.functional import KERNELS, kernel_features, positive_features
from performers.nn.estimators import ESTIMATORS, Estimator
from performers.typing import Features

DIMS = (8, 16, 64)
BLOCKS = 503


def sums(dim: int) -> dict[str, Tensor]:
    """Unit vectors x + y at which bias is looked for."""
    first, all_equal = torch.eye(dim)[0], torch.full((dim,), dim**-0.5)
    return {"e1": first, "-e1": -first, "1/√d": all_equal, "-1/√d": -all_equal}


def draw_blocks(dim: int, kind: str) -> Tensor:
    """Independent blocks of `dim` rows, one below the other."""
    return draw_projection(BLOCKS * dim, dim, kind)


def raw_qr_blocks(dim: int) -> Tensor:
    """What one gets without fixing the signs of R: orthogonal rows, but no Haar measure."""
    orthogonal, _ = torch.linalg.qr(torch.randn(BLOCKS, dim, dim, dtype=torch.float64))
    lengths = torch.randn(BLOCKS, dim, dim, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (orthogonal * lengths).flatten(0, 1).float()


def estimates(query: Features, key: Features, dim: int) -> Tensor:
    """φ(x)·φ(y), estimated by each block of rows of ω for itself."""
    terms = (query.dense() * key.dense()).squeeze(0)
    halves = len(terms) // (BLOCKS * dim)  # features of both signs, or sines and cosines
    return terms.view(halves, BLOCKS, dim).sum(dim=(0, 2)) * BLOCKS


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_lemma_1_softmax_features_are_unbiased(estimator, kind, dim):
    features = ESTIMATORS[estimator].features
    omega = draw_blocks(dim, kind)
    for direction in sums(dim).values():
        x, y = direction[None] * 3 / 4, direction[None] / 4
        samples = estimates(features(x, omega), features(y, omega), dim)
        assert_mean_within(samples, math.exp(3 / 16), standard_errors=4)


def test_a_new_row_is_held_to_lemma_1(monkeypatch):
    def without_norm(x: Tensor, omega: Tensor) -> Features:
        return positive_features(x, omega)._replace(log_rows=None)

    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(positive_features, is_nonnegative=True))
    test_lemma_1_softmax_features_are_unbiased("toy", "iid", 8)
    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(without_norm, is_nonnegative=True))
    with pytest.raises(AssertionError, match="standard errors away"):
        test_lemma_1_softmax_features_are_unbiased("toy", "iid", 8)


@pytest.mark.parametrize("dim", DIMS)
def test_a_qr_draw_without_its_signs_fixed_is_seen_to_be_biased(dim):
    omega = raw_qr_blocks(dim)
    x = sums(dim)["1/√d"][None] / 2
    samples = estimates(positive_features(x, omega), positive_features(x, omega), dim)
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(samples, math.exp(1 / 4), standard_errors=4)


def kernel(fn: str, x: Tensor, y: Tensor) -> float:
    """E[f(ω·x) f(ω·y)] for Gaussian ω, an integral over the plane of x and y."""
    along = torch.linspace(-10, 10, 401, dtype=torch.float64)
    density = (-along.square() / 2).exp() / (2 * math.pi) ** 0.5 * (along[1] - along[0])
    cosine = float(x @ y / (x.norm() * y.norm()))
    across = cosine * along[:, None] + (1 - cosine**2) ** 0.5 * along

    def f(projected: Tensor) -> Tensor:
        values = KERNELS[fn].fn(projected)
        return values.exp() if KERNELS[fn].is_exponential else values

    of_y = f(float(y.norm()) * across) @ density
    return float((f(float(x.norm()) * along) * of_y) @ density)


def test_the_integral_meets_a_closed_form():
    x, y = torch.tensor([0.8, 0.0]), torch.tensor([0.3, 0.5])
    cosine = float(x @ y / (x.norm() * y.norm()))
    angle = math.acos(cosine)
    arc_cosine = (math.sin(angle) + (math.pi - angle) * cosine) / (2 * math.pi)
    assert kernel("relu", x, y) == pytest.approx(float(x.norm() * y.norm()) * arc_cosine, rel=1e-3)
    assert kernel("exp", x, y) == pytest.approx(math.exp(float((x + y).square().sum()) / 2))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
@pytest.mark.parametrize("fn", KERNELS)
def test_generalized_kernels_meet_their_integrals(fn, kind, dim):
    omega = draw_blocks(dim, kind)
    for direction in sums(dim).values():
        x, y = 0.7 * direction, 0.3 * direction + 0.5 * torch.eye(dim)[1]
        features = [kernel_features(point[None], omega, fn, epsilon=0.0) for point in (x, y)]
        assert_mean_within(estimates(*features, dim), kernel(fn, x, y), standard_errors=4)
