"""Every numbered claim about the estimators meets a simulation, and each simulation can fail.

Vectors are short, because the spread of a squared error grows like exp(4‖x + y‖²): beyond
‖x + y‖ ≈ 1 no affordable sample would say anything.
"""

import math

import pytest
import torch
from standard_errors import assert_mean_within

from performers import theory
from performers.functional import (
    draw_projection,
    hyperbolic_features,
    positive_features,
    trigonometric_features,
)
from performers.nn.estimators import ESTIMATORS
from performers.typing import Features

# The estimators whose error `performers.theory` knows, by the names of their rows.
WITH_CLOSED_FORM = [name for name, row in ESTIMATORS.items() if row.log_joint_moment]


def pair(dim, sum_norm=0.9, share=0.3):
    """x and y with ‖x + y‖ = sum_norm in a direction of no special kind, x ≠ y."""
    z = torch.randn(dim, dtype=torch.float64)
    z = z / z.norm() * sum_norm
    across = torch.randn(dim, dtype=torch.float64) * (0.5 / math.sqrt(dim))
    return share * z + across, (1 - share) * z - across


def estimates(x, y, features, num_projections, draws):
    """Independent estimates φ(x)·φ(y) of the kernel, each with an iid ω of its own, (draws,)."""
    omega = draw_projection(draws * num_projections, len(x), "iid").double()
    of_x, of_y = features(torch.stack([x, y]), omega).dense()
    # One φ of all draws together is scaled by 1/√draws. Its signs or sines come before the draws.
    return (of_x * of_y).view(-1, draws, num_projections).sum((0, 2)) * draws


def positive_estimates(x, y, omega):
    """The same for positive features at once: omega is (draws, num_projections, dim)."""
    log_scale = -(x @ x + y @ y) / 2
    return (log_scale + omega.double() @ (x + y)).exp().mean(-1)


def orthogonal_blocks(draws, dim, num_projections, kind="orthogonal", distribution="gaussian"):
    omega = draw_projection(draws * dim, dim, kind, distribution)
    return omega.view(draws, dim, dim)[:, :num_projections]


def closed_form(estimator):
    return getattr(theory, f"mse_{estimator}")


@pytest.mark.parametrize("estimator", WITH_CLOSED_FORM)
@pytest.mark.parametrize("dim", [3, 17])
def test_lemma_2_mean_squared_errors(estimator, dim):
    x, y = pair(dim)
    features = ESTIMATORS[estimator].features
    errors = estimates(x, y, features, num_projections=2, draws=20_000) - (x @ y).exp()
    assert_mean_within(errors, 0)
    assert_mean_within(errors.square(), closed_form(estimator)(x, y, 2))


@pytest.mark.parametrize("estimator", WITH_CLOSED_FORM)
def test_lemma_2_errors_fall_as_one_over_m(estimator):
    mean_squared_error = closed_form(estimator)
    x, y = pair(5)
    torch.testing.assert_close(mean_squared_error(x, y, 7) * 7, mean_squared_error(x, y, 2) * 2)


def test_lemma_2_hyperbolic_with_m_beats_positive_with_2m():
    x, y = pair(7)
    truth = (x @ y).exp()
    hyperbolic = (estimates(x, y, hyperbolic_features, 3, 10_000) - truth).square()
    positive = (estimates(x, y, positive_features, 6, 10_000) - truth).square()
    assert_mean_within(hyperbolic, theory.mse_hyperbolic(x, y, 3))
    assert_mean_within(positive, theory.mse_positive(x, y, 6))
    assert theory.mse_hyperbolic(x, y, 3) < theory.mse_positive(x, y, 6)
    assert_mean_within(
        hyperbolic - positive, theory.mse_hyperbolic(x, y, 3) - theory.mse_positive(x, y, 6)
    )
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(hyperbolic - positive, 0)


def test_lemma_2_where_the_kernel_vanishes_only_the_trigonometric_error_grows():
    lengths = torch.arange(1.0, 5.0, dtype=torch.float64)
    x = lengths[:, None] * torch.eye(1, 3, dtype=torch.float64)
    trigonometric, positive = theory.mse_trigonometric(x, -x, 1), theory.mse_positive(x, -x, 1)
    assert (trigonometric.diff() > 0).all()
    assert (positive == 0).all()


def test_an_additive_epsilon_is_detected():
    """Features with 1e-4 added, as an earlier library has them, do not estimate small entries."""

    def with_epsilon(x, omega):
        return Features(values=positive_features(x, omega).dense() + 1e-4 / len(omega) ** 0.5)

    # Queries and keys of unit variance have ‖x‖² = 8 at dim 64. These two hardly see each other.
    x = torch.full((64,), (8 / 64) ** 0.5, dtype=torch.float64)
    y = pair(64)[0] - x
    truth = (x @ y).exp()
    assert_mean_within(estimates(x, y, positive_features, 5, 5000), truth)
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(estimates(x, y, with_epsilon, 5, 5000), truth)


def test_a_raw_qr_draw_is_detected():
    """QR without the signs of R has a first row that leans away from e₁: SM⁺ is too small there."""
    x = y = torch.eye(8, dtype=torch.float64)[0] / 2
    truth = (x @ y).exp()
    assert_mean_within(positive_estimates(x, y, orthogonal_blocks(3000, 8, 8)), truth)
    q = torch.linalg.qr(torch.randn(3000, 8, 8, dtype=torch.float64)).Q.mT
    raw = q * torch.randn(3000, 8, 8, dtype=torch.float64).norm(dim=-1, keepdim=True)
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(positive_estimates(x, y, raw), truth)


@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
@pytest.mark.parametrize("dim", [2, 8, 64])
def test_theorem_2_the_gap_holds_and_its_exact_value_is_met(dim, distribution):
    x, y = pair(dim)
    kernel, independent_mse = (
        ((x @ y).exp(), theory.mse_positive(x, y, dim))
        if distribution == "gaussian"
        else (theory.regularized_softmax_kernel(x, y), theory.mse_regularized(x, y, dim))
    )
    draws = 2000 if dim == 64 else 10_000
    omega = orthogonal_blocks(draws, dim, dim, distribution=distribution)
    errors = positive_estimates(x, y, omega) - kernel
    gap = theory.orthogonality_gap(x, y, dim, distribution)
    assert_mean_within(errors, 0)
    assert_mean_within(errors.square(), independent_mse - gap)
    # The gap itself, from pairs of orthogonal rows: far less spread than a difference of errors.
    features = (omega.double() @ (x + y) - (x @ x + y @ y) / 2).exp() - kernel
    covariance = (features.sum(1).square() - features.square().sum(1)) / (dim * (dim - 1))
    simulated_gap = -covariance * (1 - 1 / dim)
    assert_mean_within(simulated_gap, gap)
    assert 0 < theory.orthogonality_gap_bound(x, y, dim, distribution) <= gap
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(simulated_gap, 0)


@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_independent_rows_have_no_gap(distribution):
    x, y = pair(5)
    kernel, expected = (
        ((x @ y).exp(), theory.mse_positive(x, y, 5))
        if distribution == "gaussian"
        else (theory.regularized_softmax_kernel(x, y), theory.mse_regularized(x, y, 5))
    )
    omega = draw_projection(5 * 40_000, 5, "iid", distribution).view(-1, 5, 5)
    errors = positive_estimates(x, y, omega) - kernel
    assert_mean_within(errors.square(), expected)


def test_the_gap_of_several_blocks_counts_pairs_inside_blocks_only():
    dim, num_projections, draws = 3, 7, 8000
    x, y = pair(dim)
    omega = orthogonal_blocks(3 * draws, dim, dim).reshape(draws, 9, dim)[:, :7]
    errors = positive_estimates(x, y, omega) - (x @ y).exp()
    gap = theory.orthogonality_gap(x, y, num_projections)
    assert_mean_within(errors.square(), theory.mse_positive(x, y, num_projections) - gap)


def test_the_gap_of_theorem_2_is_tight_for_short_vectors():
    x, y = pair(5, sum_norm=1e-3)
    ratio = theory.orthogonality_gap_bound(x, y, 3) / theory.orthogonality_gap(x, y, 3)
    torch.testing.assert_close(ratio, torch.tensor(1.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_theorem_6_holds_for_a_kernel_that_is_not_exponential():
    """g(u) = 1 + u² + u⁴ has nonnegative coefficients: F(z) = 1 + ‖z‖² + 3‖z‖⁴, a₀ = 1."""
    dim, m = 5, 3
    z = sum(pair(dim))
    value = 1 + z @ z + 3 * (z @ z) ** 2
    projected = orthogonal_blocks(10_000, dim, m).double() @ z
    errors = 1 + projected**2 + projected**4 - value
    assert_mean_within(errors.mean(1), 0)
    gaps = errors.square().mean(1) / m - errors.mean(1).square()
    bound = theory.orthogonality_gap_bound_beautiful(value, torch.tensor(1.0), m, dim)
    standard_error = gaps.std() / len(gaps) ** 0.5
    assert gaps.mean() + 4 * standard_error >= bound
    assert gaps.mean() - 4 * standard_error > 0


def test_theorem_2_asks_for_no_more_rows_than_dimensions():
    x, y = pair(3)
    with pytest.raises(ValueError, match="num_projections ≤ dim, got 4 with dim 3"):
        theory.orthogonality_gap_bound(x, y, 4)


@pytest.mark.parametrize("dim", [1, 2, 8, 64])
def test_smreg_is_its_series(dim):
    x, y = pair(dim)
    omega = draw_projection(40_000, dim, "iid", "sphere")[:, None]
    assert_mean_within(positive_estimates(x, y, omega), theory.regularized_softmax_kernel(x, y))


def test_smreg_is_cosh_in_one_dimension_and_a_bessel_function_in_two():
    square_norms = torch.tensor([0.0, 0.3, 2.0, 11.0, 120.0], dtype=torch.float64)
    softmax_part = (square_norms / 2).exp()
    cosh = square_norms.sqrt().cosh()
    torch.testing.assert_close(theory.regularized_ratio(square_norms, 1), cosh / softmax_part)
    bessel = torch.special.i0((2 * square_norms).sqrt())
    torch.testing.assert_close(theory.regularized_ratio(square_norms, 2), bessel / softmax_part)


@pytest.mark.parametrize("dim", [1, 2, 8, 64, 1024])
def test_theorem_1_smreg_is_below_softmax_and_above_the_bound(dim):
    square_norms = torch.linspace(0, 60, 61, dtype=torch.float64)
    ratio = theory.regularized_ratio(square_norms, dim)
    bound = theory.regularized_ratio_bound(square_norms, dim)
    assert (ratio <= 1 + 1e-12).all()
    assert (ratio[1:] < 1).all()
    assert (bound <= ratio).all()
    assert (bound > 0).all()


@pytest.mark.parametrize("dim", [64, 256, 1024, 4096])
def test_theorem_1_entries_of_bounded_matrices_stay_above_the_asymptote(dim):
    """‖x + y‖² ≤ 4 log C for an attention matrix with L1 norm at most C; here C = 5."""
    square_norm = torch.tensor(4 * math.log(5), dtype=torch.float64)
    assert theory.regularized_ratio(square_norm, dim) > theory.regularized_ratio_asymptote(dim)


def test_theorem_1_the_ratio_approaches_1_as_one_over_dim():
    square_norm = torch.tensor(4.0, dtype=torch.float64)
    shortfall = [dim * (1 - theory.regularized_ratio(square_norm, dim)) for dim in (10**3, 10**5)]
    assert shortfall[1] == pytest.approx((4 / 2) ** 2, rel=1e-3)
    assert shortfall[0] == pytest.approx((4 / 2) ** 2, rel=1e-2)


@pytest.mark.parametrize("dim", [2, 3, 8, 17])
@pytest.mark.parametrize("theta", [0.1, 0.4])
def test_the_moment_generating_function_of_a_feature_is_its_integral(dim, theta):
    x, y = pair(dim)
    omega = draw_projection(40_000, dim, "iid", "sphere")[:, None]
    samples = (theta * positive_estimates(x, y, omega)).exp()
    expected = theory.regularized_moment_generating_function(x, y, theta)
    assert_mean_within(samples, expected)
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(samples, expected * 1.2)


@pytest.mark.parametrize(("dim", "m"), [(2, 2), (8, 5), (17, 17)])
def test_theorem_3_bounds_the_tails_and_orthogonal_rows_have_the_smaller(dim, m):
    x, y = pair(dim, sum_norm=1.2)
    threshold = 1.3 * float(theory.regularized_softmax_kernel(x, y))
    thetas = [0.05 * 1.3**step for step in range(20)]
    bounds = {
        "iid": theory.regularized_tail_bound_iid,
        "orthogonal": theory.regularized_tail_bound_orthogonal,
    }
    best = {}
    for kind, bound in bounds.items():
        best[kind] = min(float(bound(x, y, threshold, theta, m)) for theta in thetas)
        block = m if kind == "iid" else dim
        omega = draw_projection(10_000 * block, dim, kind, "sphere").view(-1, block, dim)[:, :m]
        exceeded = (positive_estimates(x, y, omega) > threshold).double()
        assert exceeded.mean() > 0
        assert exceeded.mean() - 4 * exceeded.std() / len(exceeded) ** 0.5 <= best[kind] < 1
    assert best["orthogonal"] < best["iid"]


@pytest.mark.parametrize(("dim", "m"), [(2, 2), (5, 3), (8, 8)])
def test_theorem_5_orthogonal_rows_have_a_smaller_generating_function(dim, m):
    """The inequality under the bound: E exp(θ ΣX) ≤ M(θ)^m − gain."""
    x, y = pair(dim)
    theta = 2.2 / m
    generating_function = theory.regularized_moment_generating_function(x, y, theta)
    # At threshold 0 the bound is that right-hand side.
    right = theory.regularized_tail_bound_orthogonal(x, y, 0.0, theta, m)
    assert right < generating_function**m

    def generated(kind):
        block = m if kind == "iid" else dim
        omega = draw_projection(15_000 * block, dim, kind, "sphere").view(-1, block, dim)[:, :m]
        return (theta * m * positive_estimates(x, y, omega)).exp()

    assert_mean_within(generated("iid"), generating_function**m)
    orthogonal = generated("orthogonal")
    standard_error = orthogonal.std() / len(orthogonal) ** 0.5
    assert orthogonal.mean() - 4 * standard_error <= right
    assert orthogonal.mean() + 4 * standard_error < generating_function**m


def test_theorem_3_with_the_printed_exponent_fails_for_two_rows():
    """Printed: exp(−m/2 (‖x‖² + ‖y‖²)). For x ≈ −y and m = 2 the "bound" is then negative."""
    x = torch.tensor([2.5, 0.5], dtype=torch.float64)
    y = torch.tensor([-2.5, 0.5], dtype=torch.float64)
    theta = 1 / float((-(x @ x + y @ y) / 2).exp())
    generating_function = theory.regularized_moment_generating_function(x, y, theta)
    lengths = x @ x + y @ y
    gain = theta**4 * 2 / (4 * (2 + 2)) * ((x + y) @ (x + y)) ** 2
    assert generating_function**2 - (-lengths).exp() * gain < 0
    proven = theory.regularized_tail_bound_orthogonal(x, y, 0.0, theta, 2)
    assert proven == pytest.approx(float(generating_function**2 - (-2 * lengths).exp() * gain))
    assert proven > 0


@pytest.mark.parametrize("length", [32, 512])
def test_theorem_4_the_projections_do_not_depend_on_the_length(length):
    """At the m of Theorem 4 (its constant taken as 1) every entry is within ε, at any length."""
    dim, radius, epsilon = 8, 1.0, 0.5
    m = math.ceil(theory.sufficient_projections(epsilon, radius, dim))
    query, key = torch.nn.functional.normalize(torch.randn(2, length, dim), dim=-1).unbind()
    query, key = query * dim**-0.25, key * dim**-0.25

    def largest_error(num_projections):
        omega = draw_projection(num_projections, dim)
        approximate = (
            trigonometric_features(query, omega).dense()
            @ trigonometric_features(key, omega).dense().mT
        )
        return float((approximate - (query @ key.mT).exp()).abs().max())

    assert max(largest_error(m) for _ in range(20)) <= epsilon
    assert max(largest_error(m // 128) for _ in range(20)) > epsilon


def test_theorem_7_is_theorem_4_for_the_gaussian_kernel():
    epsilon, radius, dim = 0.3, 1.5, 16
    delta = epsilon / math.exp(radius**2 * dim**-0.5 / 2) ** 2
    theorem_4 = dim / delta**2 * math.log(4 * dim**0.75 * radius / delta)
    assert theory.sufficient_projections(epsilon, radius, dim) == pytest.approx(theorem_4)


def test_theorem_4_names_the_number_that_is_wrong():
    with pytest.raises(ValueError, match=r"epsilon must be positive and finite, got -0\.1"):
        theory.sufficient_projections(-0.1, 1.0, 8)


def optimal_positive_estimates(x, y, omega, parameter):
    """φ(x)·φ(y) of one feature f(ω, x), as Likhosherstov et al. define it."""
    omega = omega.double()

    def feature(vector):
        exponent = (
            parameter * omega.square().sum(-1)
            + math.sqrt(1 - 4 * parameter) * (omega @ vector)
            - vector @ vector / 2
        )
        return (1 - 4 * parameter) ** (len(vector) / 4) * exponent.exp()

    return feature(x) * feature(y)


@pytest.mark.parametrize("parameter", [-0.3, -0.05, 0.0, 0.02])
def test_optimal_positive_features_are_unbiased_with_the_variance_of_the_closed_form(parameter):
    x, y = pair(5, sum_norm=0.7)
    samples = optimal_positive_estimates(x, y, torch.randn(400_000, 5), parameter)
    errors = samples - (x @ y).exp()
    assert_mean_within(errors, 0)
    assert_mean_within(errors.square(), theory.mse_optimal_positive(x, y, 1, parameter))


def test_optimal_positive_features_with_parameter_0_are_positive_features():
    x, y = pair(5)
    torch.testing.assert_close(
        theory.mse_optimal_positive(x, y, 3, 0.0), theory.mse_positive(x, y, 3)
    )


@pytest.mark.parametrize("dim", [1, 5, 64])
@pytest.mark.parametrize("sum_norm", [0.01, 1.0, 4.0])
def test_the_optimal_parameter_minimizes_the_variance(dim, sum_norm):
    x, y = pair(dim, sum_norm)
    best = theory.optimal_positive_parameter(sum_norm**2, dim)
    assert best <= 0
    smallest = theory.mse_optimal_positive(x, y, 1, best)
    for step in (-1e-3, 1e-3):
        nearby = best + step * (1 / 8 - best)
        assert theory.mse_optimal_positive(x, y, 1, nearby) >= smallest


def test_the_optimal_parameter_of_vanishing_vectors_is_0():
    assert theory.optimal_positive_parameter(0.0, 7) == 0


def test_a_parameter_of_infinite_variance_is_refused():
    x, y = pair(3)
    with pytest.raises(ValueError, match="below 1/8"):
        theory.mse_optimal_positive(x, y, 1, 0.125)


def test_closed_forms_take_batches():
    x, y = torch.randn(2, 3, 5, 7, dtype=torch.float64).mul(0.2).unbind()
    for function in (theory.mse_positive, theory.mse_regularized, theory.orthogonality_gap):
        whole = function(x, y, 4)
        assert whole.shape == (3, 5)
        torch.testing.assert_close(whole[2, 4], function(x[2, 4], y[2, 4], 4))


@pytest.mark.parametrize("norm", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_over_keys_and_their_opposites_trigonometric_features_vary_less_at_any_norm(norm):
    """Why Figure 4's two orders do not share an input scale: see experiments/figure-4."""
    query = torch.randn(16, dtype=torch.float64)
    keys = torch.randn(101, 16, dtype=torch.float64)
    query = query / query.norm() * norm
    keys = keys / keys.norm(dim=1, keepdim=True) * norm
    both = torch.cat([keys, -keys])
    positive = theory.mse_positive(query.expand_as(both), both, 1).sum()
    trigonometric = theory.mse_trigonometric(query.expand_as(both), both, 1).sum()
    assert trigonometric < positive
