"""scikit-learn's transformers of random features: its contract, and Eq. 5 for every kernel.

Not in a folder tests/sklearn: tests/ is on the path, where it would hide a missing scikit-learn.
"""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.kernel_approximation import RBFSampler
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from standard_errors import assert_mean_within

from performers import functional
from performers.sklearn import (
    KERNELS,
    HyperbolicFeatures,
    IsotropicKernel,
    OrthogonalRandomFeatures,
    PositiveFeatures,
    RandomKernelFeatures,
)

TRANSFORMERS = [
    OrthogonalRandomFeatures,
    PositiveFeatures,
    HyperbolicFeatures,
    RandomKernelFeatures,
]
DIM = 5
GAMMA = 0.7


def points(rows=3, dim=DIM):
    return np.random.RandomState(0).normal(size=(rows, dim)) / (2 * dim**0.5)


def angles(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = np.clip(unit @ unit.T, -1, 1)
    np.fill_diagonal(cosine, 1)  # arccos turns a rounding of 1e-16 there into 1e-8
    return np.arccos(cosine)


def arc_cosine_1(x):
    theta, norms = angles(x), np.linalg.norm(x, axis=1)
    return np.outer(norms, norms) * (np.sin(theta) + (np.pi - theta) * np.cos(theta)) / np.pi


CLOSED_FORMS = {
    "rbf": lambda x: rbf_kernel(x, gamma=1),
    "softmax": lambda x: np.exp(x @ x.T),
    "angular": lambda x: 1 - 2 * angles(x) / np.pi,
    "arc-cosine-0": lambda x: 1 - angles(x) / np.pi,
    "arc-cosine-1": arc_cosine_1,
}

# What estimates the kernel of that name, for a number of components.
ESTIMATORS = {
    **{name: (name, RandomKernelFeatures, {"kernel": name}) for name in KERNELS},
    "orthogonal random features": ("rbf", OrthogonalRandomFeatures, {}),
    "positive softmax": ("softmax", PositiveFeatures, {}),
    "positive rbf": ("rbf", PositiveFeatures, {"kernel": "rbf"}),
    "hyperbolic softmax": ("softmax", HyperbolicFeatures, {}),
    "hyperbolic rbf": ("rbf", HyperbolicFeatures, {"kernel": "rbf"}),
}


def kernel_estimates(name, x, n_components, draws, **options):
    """φ(x)·φ(y) of independent draws, [draws, rows, rows]; and K(x, y)."""
    kernel, transformer, chosen = ESTIMATORS[name]
    found = []
    for seed in range(draws):
        phi = transformer(
            n_components=n_components, gamma=GAMMA, random_state=seed, **chosen, **options
        )
        features = phi.fit_transform(x)
        found.append(features @ features.T)
    return torch.from_numpy(np.stack(found)), torch.from_numpy(CLOSED_FORMS[kernel](x * GAMMA**0.5))


def mean_squared_error(name, x, **options):
    estimates, exact = kernel_estimates(name, x, **options)
    return float((estimates - exact).square().mean())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("transformer", TRANSFORMERS)
def test_scikit_learns_own_checks_pass(transformer, monkeypatch):
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    check_estimator(transformer())


# 6 components are even, 7 are not, 11 are more than two orthogonal blocks of 5 projections
@pytest.mark.parametrize("n_components", [6, 7, 11])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_kernels_are_unbiased(name, n_components):
    assert_mean_within(*kernel_estimates(name, points(), n_components, draws=150))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_orthogonal_projections_have_a_lower_error_than_independent_ones(name):
    orthogonal, iid = (
        mean_squared_error(name, points(), n_components=20, draws=150, projection=kind)
        for kind in ("orthogonal", "iid")
    )
    assert orthogonal < 0.95 * iid


@pytest.mark.parametrize("projection", ["iid", "hadamard", "givens"])
def test_every_kind_of_projection_is_unbiased(projection):
    x = points(dim=16)
    assert_mean_within(
        *kernel_estimates("orthogonal random features", x, 32, draws=150, projection=projection)
    )


def test_hyperbolic_features_have_a_lower_error_than_as_many_positive_ones():
    hyperbolic, positive = (
        mean_squared_error(name, points() / 2, n_components=20, draws=150, projection="iid")
        for name in ("hyperbolic softmax", "positive softmax")
    )
    assert hyperbolic < positive / 2


def test_orthogonal_random_features_have_a_lower_error_than_rbf_sampler():
    x = points(rows=11)
    exact = rbf_kernel(x, gamma=GAMMA)
    errors = {}
    for transformer in (OrthogonalRandomFeatures, RBFSampler):
        found = [
            transformer(n_components=30, gamma=GAMMA, random_state=seed).fit_transform(x)
            for seed in range(50)
        ]
        errors[transformer] = np.mean([np.square(f @ f.T - exact).mean() for f in found])
    assert errors[OrthogonalRandomFeatures] < errors[RBFSampler] / 4


@pytest.mark.parametrize("projection", ["orthogonal", "iid", "hadamard", "givens"])
def test_a_distribution_of_lengths_makes_its_own_isotropic_kernel(projection):
    def cauchy(count, n_features, random_state):
        normal = random_state.normal(size=(count, n_features))
        return np.linalg.norm(normal, axis=1) / np.abs(random_state.normal(size=count))

    x = points(dim=16)
    kernel = IsotropicKernel((np.cos, np.sin))
    estimates = []
    for seed in range(150):
        phi = RandomKernelFeatures(
            kernel, 32, gamma=4.0, projection=projection, distribution=cauchy, random_state=seed
        )
        features = phi.fit_transform(x)
        estimates.append(features @ features.T)
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    assert_mean_within(
        torch.from_numpy(np.stack(estimates)), torch.from_numpy(np.exp(-2 * distances))
    )


def test_h_and_functions_of_ones_own_are_those_of_equation_5():
    kernel = IsotropicKernel((np.tanh, np.abs, np.sign), h=lambda x: 1 + x[:, :1] ** 2)
    x = points(rows=7)
    phi = RandomKernelFeatures(kernel, 12, gamma=GAMMA, random_state=0).fit(x)
    scaled = x * GAMMA**0.5
    projected = scaled @ phi.omega_.T
    blocks = [np.tanh(projected), np.abs(projected), np.sign(projected)]
    expected = (1 + scaled[:, :1] ** 2) * np.hstack(blocks) / 2
    np.testing.assert_allclose(phi.transform(x), expected)


@pytest.mark.parametrize(
    ("phi", "same"),
    [
        (PositiveFeatures(6), functional.positive_features),
        (HyperbolicFeatures(6), functional.hyperbolic_features),
        (RandomKernelFeatures("softmax", 6), functional.positive_features),
    ],
)
def test_features_are_those_of_the_functional_core(phi, same):
    x = points(rows=7)
    found = phi.set_params(gamma=1.0, random_state=0).fit_transform(x)
    expected = same(torch.from_numpy(x), torch.from_numpy(phi.omega_)).dense()
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("transformer", [PositiveFeatures, HyperbolicFeatures])
@pytest.mark.parametrize("kernel", ["softmax", "rbf"])
def test_positive_features_are_above_0_and_finite_at_large_norms(transformer, kernel):
    x = points(rows=7, dim=53)
    phi = transformer(100, kernel=kernel, gamma=1.0, random_state=0).fit(x)
    assert (phi.transform(x) > 0).all()
    assert np.isfinite(phi.transform((1e4 * x).astype(np.float32))).all()


@pytest.mark.parametrize("transformer", TRANSFORMERS)
@pytest.mark.parametrize("n_components", [1, 2, 7, 100])
def test_the_result_has_n_components_named_columns_in_the_dtype_of_the_input(
    transformer, n_components
):
    for dtype in (np.float32, np.float64):
        phi = transformer(n_components=n_components).fit(points().astype(dtype))
        found = phi.transform(points(rows=7).astype(dtype))
        assert found.shape == (7, n_components)
        assert found.dtype == dtype
        assert len(phi.get_feature_names_out()) == n_components
    assert phi.get_feature_names_out()[0] == f"{transformer.__name__.lower()}0"


@pytest.mark.parametrize("transformer", TRANSFORMERS)
def test_random_state_decides_everything(transformer):
    x = points()
    found = [transformer(random_state=seed).fit_transform(x) for seed in (0, 0, 1)]
    assert (found[0] == found[1]).all()
    assert (found[0] != found[2]).any()


def test_gamma_scale_makes_features_indifferent_to_the_scale_of_the_data():
    x = points()
    phi = OrthogonalRandomFeatures(random_state=0)
    np.testing.assert_allclose(phi.fit_transform(x), phi.fit_transform(1000 * x))
    assert phi.fit(np.ones((3, 5))).gamma_ == 1  # data that do not vary have no scale


def test_a_kernel_of_ones_own_survives_cloning_and_pickling():
    kernel = IsotropicKernel((np.tanh,))
    phi = clone(RandomKernelFeatures(kernel, random_state=0)).fit(points())
    assert phi.kernel == kernel
    copy = pickle.loads(pickle.dumps(phi))
    assert (copy.transform(points()) == phi.transform(points())).all()


def test_a_linear_model_after_the_features_is_a_kernel_machine_that_a_grid_search_can_tune():
    x, y = load_digits(return_X_y=True)
    x, y = x[:600], y[:600]
    model = make_pipeline(OrthogonalRandomFeatures(random_state=0), RidgeClassifier())
    grid = {"orthogonalrandomfeatures__n_components": np.array([10, 300])}
    search = GridSearchCV(model, grid, cv=2).fit(x, y)
    assert search.best_params_ == {"orthogonalrandomfeatures__n_components": 300}
    assert search.best_score_ > 0.85


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"n_components": 0}, "n_components == 0, must be >= 1"),
        ({"n_components": 10**400}, "n_components == 1000.*must be <= "),
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"gamma": 10**400}, "gamma must be positive and finite, got 1000"),
        ({"gamma": "scales"}, "unknown gamma 'scales'.*Did you mean 'scale'"),
        ({"kernel": "rbg"}, "unknown kernel 'rbg'.*Did you mean 'rbf'"),
        ({"projection": "orthogonl"}, "unknown kind of projection 'orthogonl'"),
        ({"distribution": "normal"}, "unknown distribution 'normal'"),
        (
            {"distribution": lambda *_: [1.0]},
            r"distribution must return .* \(50,\) here, got \(1,\)",
        ),
        (
            {"kernel": IsotropicKernel((np.sum,))},
            r"functions must return .* \(3, 100\) here, got \(\)",
        ),
        (
            {"kernel": IsotropicKernel((np.sin,), h=lambda x: x[:, 0])},
            r"h must return an array of shape \(3, 1\) here, got \(3,\)",
        ),
    ],
)
def test_wrong_parameters_are_named(parameters, words):
    with pytest.raises(ValueError, match=words):
        RandomKernelFeatures(**parameters).fit_transform(points())


def test_a_kernel_needs_a_function():
    with pytest.raises(ValueError, match="at least one function"):
        IsotropicKernel(())


@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_gamma_that_is_no_scale_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma must be positive and finite, got"):
        OrthogonalRandomFeatures(gamma=gamma).fit(np.ones((3, 5)))
