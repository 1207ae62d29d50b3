"""Random features as scikit-learn transformers: a linear model after them is a kernel machine.

    φ(x) = h(x)/√m · (f₁(ω₁·x), …, f₁(ω_m·x), …, f_l(ω₁·x), …, f_l(ω_m·x)),    ω_i ~ 𝒟

estimates the kernel K(x, y) = E[φ(x)·φ(y)]. The kernel is determined by h, f₁ … f_l and an
isotropic 𝒟: `IsotropicKernel` holds h and the f, and `distribution` is 𝒟. The rows of ω may be
orthogonal in all cases.

    make_pipeline(OrthogonalRandomFeatures(512), LogisticRegression())

| transformer | kernel |
|---|---|
| `OrthogonalRandomFeatures` | Gaussian, by sin and cos |
| `PositiveFeatures` | softmax or Gaussian, by features above 0 |
| `HyperbolicFeatures` | the same with less variance |
| `RandomKernelFeatures` | any of `KERNELS`, or h, f and 𝒟 of your own |

Source: Choromanski et al. 2021, Eq. 5 and Section 2.4.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

from performers.checks import MOST, check_choice, check_number, described
from performers.functional.projections import draw_projection

__all__ = [
    "KERNELS",
    "HyperbolicFeatures",
    "IsotropicKernel",
    "OrthogonalRandomFeatures",
    "PositiveFeatures",
    "RandomKernelFeatures",
]

Array = np.ndarray
Lengths = Callable[[int, int, np.random.RandomState], Array]
Fitted = TypeVar("Fitted", bound="IsotropicFeatures")


@dataclass(frozen=True)  # scikit-learn's clone() takes named tuples apart
class IsotropicKernel:
    """h and f₁ … f_l of Eq. 5, as functions of arrays.

    `functions` map projections (samples, m) to values elementwise; `h` maps rows (samples, dim) to
    factors (samples, 1), and None is h = 1. With `is_exponential` both give logarithms, and exp is
    taken of their sum, because each alone would overflow, or vanish, long before φ does.
    """

    functions: tuple[Callable[[Array], Array], ...]
    h: Callable[[Array], Array] | None = None
    is_exponential: bool = False

    def __post_init__(self) -> None:
        if not self.functions:
            raise ValueError("an isotropic kernel needs at least one function, got none.")


ROOT_2 = math.sqrt(2)


def _itself(u: Array) -> Array:
    return u


def _times_root_2(u: Array) -> Array:
    return ROOT_2 * u


def _sin_root_2(u: Array) -> Array:
    return np.sin(ROOT_2 * u)


def _cos_root_2(u: Array) -> Array:
    return np.cos(ROOT_2 * u)


def _step(u: Array) -> Array:
    return ROOT_2 * (u > 0).astype(u.dtype)


def _relu(u: Array) -> Array:
    return ROOT_2 * np.maximum(u, 0)


def _minus_half_square_norm(x: Array) -> Array:
    return -np.square(x).sum(axis=1, keepdims=True) / 2


def _minus_two_square_norms(x: Array) -> Array:
    return -2 * np.square(x).sum(axis=1, keepdims=True)


# Lemma 1. The Gaussian kernel is exp(−‖x‖²) · exp(2 x·y) · exp(−‖y‖²), a softmax kernel of √2 x.
POSITIVE = {
    "softmax": IsotropicKernel((_itself,), _minus_half_square_norm, is_exponential=True),
    "rbf": IsotropicKernel((_times_root_2,), _minus_two_square_norms, is_exponential=True),
}

# By name, with θ the angle between x and y, for Gaussian ω:
KERNELS = {
    "rbf": IsotropicKernel((_sin_root_2, _cos_root_2)),  # exp(−‖x − y‖²)
    "softmax": POSITIVE["softmax"],  # exp(x·y)
    "angular": IsotropicKernel((np.sign,)),  # 1 − 2θ/π
    "arc-cosine-0": IsotropicKernel((_step,)),  # 1 − θ/π
    "arc-cosine-1": IsotropicKernel((_relu,)),  # ‖x‖‖y‖ (sin θ + (π − θ) cos θ)/π
}


class IsotropicFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator, ABC):
    """What the four transformers share: ω drawn in `fit`, φ(√gamma · x) computed in `transform`.

    `n_components`: columns of the result, l for each of m projections.
    `gamma`: a number above 0, or "scale" for 1 / (n_features · X.var()), as in `SVC`.
    `projection`: "orthogonal", "iid", "hadamard" or "givens" rows of ω, see `draw_projection`.
    `distribution`: 𝒟, as the lengths of the rows of ω, whose directions are uniform. "gaussian",
    "sphere" (each √n_features), or a function (count, n_features, random_state) → (count,).
    `random_state`: as everywhere in scikit-learn.

    Fitted attributes: `omega_` (m, n_features), `gamma_`, `n_features_in_`, `feature_names_in_`.
    Results have the dtype of X, float32 or float64.

    `fit` raises ValueError or TypeError for parameters that do not fit.
    Cost: O(samples · n_components · n_features / l).
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        gamma: float | str = "scale",
        projection: str = "orthogonal",
        distribution: str | Lengths = "gaussian",
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.gamma = gamma
        self.projection = projection
        self.distribution = distribution
        self.random_state = random_state

    @abstractmethod
    def _isotropic_kernel(self) -> IsotropicKernel:
        """The h and f₁ … f_l that the parameters name. Raises ValueError for unknown names."""

    def fit(self: Fitted, X: Any, y: Any = None) -> Fitted:
        """Draw ω for the number of columns of X; y is not used."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        num_functions = len(self._isotropic_kernel().functions)
        check_scalar(self.n_components, "n_components", Integral, min_val=1, max_val=MOST)
        random_state = check_random_state(self.random_state)
        self.gamma_ = self._numeric_gamma(X)
        num_projections = math.ceil(self.n_components / num_functions)
        self.omega_ = self._drawn(num_projections, X.shape[1], random_state)
        self._widths, self._weights = self._columns(num_functions, num_projections, random_state)
        self._n_features_out = self.n_components
        return self

    def transform(self, X: Any) -> Float[Array, "samples n_components"]:
        """φ(√gamma · x) of every row."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        kernel = self._isotropic_kernel()
        x = X * math.sqrt(self.gamma_)
        projected = x @ self.omega_.astype(X.dtype).T
        columns = [
            _of_shape((len(x), width), "each of the functions", f(projected[:, :width]))
            for f, width in zip(kernel.functions, self._widths, strict=True)
        ]
        features = np.concatenate(columns, axis=1)
        if kernel.h is not None:
            h = _of_shape((len(x), 1), "h", kernel.h(x))
            features = features + h if kernel.is_exponential else features * h
        if kernel.is_exponential:
            features = np.exp(features)
        return (features * self._weights).astype(X.dtype, copy=False)

    def _numeric_gamma(self, x: Array) -> float:
        if isinstance(self.gamma, str):
            check_choice("gamma", self.gamma, ["scale"])
            variance = float(x.var())
            return 1 / (x.shape[1] * variance) if variance > 0 else 1.0
        gamma = self.gamma
        if isinstance(gamma, Real) and not isinstance(gamma, int):
            gamma = float(gamma)  # numpy's numbers are numbers, too
        check_number("gamma", gamma, otherwise='Or write gamma="scale".')
        return float(gamma)

    def _drawn(
        self, count: int, dim: int, random_state: np.random.RandomState
    ) -> Float[Array, "count dim"]:
        generator = torch.Generator().manual_seed(int(random_state.randint(2**31)))
        if isinstance(self.distribution, str):
            kind, distribution = self.projection, self.distribution
            return draw_projection(count, dim, kind, distribution, generator=generator).numpy()
        if not callable(self.distribution):
            raise TypeError(
                "distribution must be a word or a function (count, n_features, random_state) that "
                f"gives the lengths of rows, got {described(self.distribution)}."
            )
        # A Gaussian row has a uniform direction, independent of its length.
        directions = draw_projection(count, dim, self.projection, generator=generator).numpy()
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = self.distribution(count, dim, random_state)
        return directions * _of_shape((count,), "distribution", lengths)[:, None]

    def _columns(
        self, num_functions: int, num_projections: int, random_state: np.random.RandomState
    ) -> tuple[list[int], Float[Array, " n_components"]]:
        """For each function the number of projections that it is applied to; and the weight of each
        column.

        Weights are 1/√m. If l does not divide n_components, ω_m has only some of the functions,
        chosen at random, and they weigh √(l / number chosen) as much: that leaves no bias.
        """
        missing = num_functions * num_projections - self.n_components
        widths = np.full(num_functions, num_projections)
        widths[random_state.permutation(num_functions)[:missing]] -= 1
        weights = np.full((num_functions, num_projections), num_projections**-0.5)
        weights[:, -1] *= math.sqrt(num_functions / (num_functions - missing))
        kept = [row[:width] for row, width in zip(weights, widths, strict=True)]
        return widths.tolist(), np.concatenate(kept)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _of_shape(shape: tuple[int, ...], name: str, values: Any) -> Array:
    """What a function of the caller returned, if it has the shape that it must have."""
    values = np.asarray(values)
    if values.shape != shape:
        raise ValueError(f"{name} must return an array of shape {shape} here, got {values.shape}.")
    return values


class OrthogonalRandomFeatures(IsotropicFeatures):
    """Random Fourier features of the Gaussian kernel exp(−gamma ‖x − y‖²), with orthogonal ω.

    `sklearn.kernel_approximation.RBFSampler` estimates the same kernel with independent ω and
    random offsets. The error here is lower: ω is orthogonal, and with both sin and cos of every
    projection no offset is needed. Parameters are those of `IsotropicFeatures`.

    Source: Choromanski et al. 2021, Sections 2.2 and 2.4; Rahimi and Recht 2007; Yu et al. 2016,
    "Orthogonal random features".

    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import RidgeClassifier
    >>> from sklearn.pipeline import make_pipeline
    >>> X, y = load_digits(return_X_y=True)
    >>> model = make_pipeline(OrthogonalRandomFeatures(512, random_state=0), RidgeClassifier())
    >>> bool(model.fit(X[:1000], y[:1000]).score(X[1000:], y[1000:]) > 0.93)
    True
    """

    def _isotropic_kernel(self) -> IsotropicKernel:
        return KERNELS["rbf"]


class PositiveFeatures(IsotropicFeatures):
    """Positive random features, the + of FAVOR+: every column is above 0, up to underflow.

    `kernel`: "softmax", exp(gamma · x·y), or "rbf", exp(−gamma ‖x − y‖²). For models that need
    nonnegative columns, and for sums of kernel values that must not vanish, such as densities. The
    variance grows like exp(gamma ‖x + y‖²): center X first, or use `OrthogonalRandomFeatures` where
    columns may be negative. The other parameters are those of `IsotropicFeatures`.

    Source: Choromanski et al. 2021, Lemma 1.
    """

    def __init__(
        self,
        n_components: int = 100,
        *,
        kernel: str = "softmax",
        gamma: float | str = "scale",
        projection: str = "orthogonal",
        distribution: str | Lengths = "gaussian",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            n_components,
            gamma=gamma,
            projection=projection,
            distribution=distribution,
            random_state=random_state,
        )
        self.kernel = kernel

    def _isotropic_kernel(self) -> IsotropicKernel:
        check_choice("kernel", self.kernel, POSITIVE)
        return POSITIVE[self.kernel]


class HyperbolicFeatures(PositiveFeatures):
    """Positive features that use every ω with both signs: half the columns are of −ω.

    The variance is never larger than that of `PositiveFeatures` with as many independent columns.
    Parameters are those of `PositiveFeatures`.

    Source: Choromanski et al. 2021, Lemmas 1 and 2.
    """

    def _isotropic_kernel(self) -> IsotropicKernel:
        positive = super()._isotropic_kernel()
        (log_f,) = positive.functions
        # l·m columns are divided by √m, so each f has a factor 1/√2
        log_root_2 = math.log(2) / 2
        signs = (lambda u: log_f(u) - log_root_2, lambda u: log_f(-u) - log_root_2)
        return replace(positive, functions=signs)


class RandomKernelFeatures(IsotropicFeatures):
    """Random features of any isotropic kernel: E[φ(x)·φ(y)] = K(√gamma · x, √gamma · y).

    `kernel`: a name in `KERNELS`, that is "rbf" (Gaussian), "softmax", "angular" (sgn),
    "arc-cosine-0" or "arc-cosine-1", or an `IsotropicKernel`. The names are right for the default
    `distribution`; with another one the same functions give other kernels. The other parameters are
    those of `IsotropicFeatures`.

    exp(−‖x − y‖), for example, has the Fourier transform of a multivariate Cauchy distribution:

    >>> kernel = IsotropicKernel((np.sin, np.cos))
    >>> def cauchy(count, n_features, random_state):
    ...     normal = random_state.normal(size=(count, n_features))
    ...     return np.linalg.norm(normal, axis=1) / np.abs(random_state.normal(size=count))
    >>> phi = RandomKernelFeatures(kernel, 10000, gamma=1.0, distribution=cauchy, random_state=0)
    >>> x, y = phi.fit_transform([[0.0, 0.0], [0.3, 0.4]])
    >>> bool(abs(x @ y - np.exp(-0.5)) < 0.05)
    True

    Source: Choromanski et al. 2021, Eq. 5; Cho and Saul 2009, "Kernel methods for deep learning"
    (arc-cosine kernels).
    """

    def __init__(
        self,
        kernel: str | IsotropicKernel = "rbf",
        n_components: int = 100,
        *,
        gamma: float | str = "scale",
        projection: str = "orthogonal",
        distribution: str | Lengths = "gaussian",
        random_state: Any = None,
    ) -> None:
        super().__init__(
            n_components,
            gamma=gamma,
            projection=projection,
            distribution=distribution,
            random_state=random_state,
        )
        self.kernel = kernel

    def _isotropic_kernel(self) -> IsotropicKernel:
        if isinstance(self.kernel, IsotropicKernel):
            return self.kernel
        check_choice("kernel", self.kernel, KERNELS)
        return KERNELS[self.kernel]
