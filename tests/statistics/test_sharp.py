"""Sharp features are unbiased, and every step of theirs lowers the variance on skewed data."""

import itertools

import pytest
import torch
from standard_errors import assert_mean_within
from torch import Tensor

from performers import SharpFeatures, draw_projection, favor_attention, softmax_attention
from performers.functional.moments import Moments, received_attention
from performers.functional.sharp import QUERY_RATIO, ReparametrizedFeatures, sharpen
from performers.theory import log_joint_moment_optimal

# What each step adds, from plain positive features to the whole.
STEPS = {
    "plain": {"shift": False, "balance": False, "optimal": "none"},
    "shift": {"balance": False, "optimal": "none"},
    "balance": {"optimal": "none"},
    "one exponent": {"optimal": "isotropic"},
    "an exponent per coordinate": {},
}


def skewed(length: int = 13, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Queries and keys with means, and with long axes of their own."""
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    stretch = torch.logspace(-1.5, 0.1, dim, dtype=torch.float64)
    query = torch.randn(1, 2, length, dim, dtype=torch.float64) * stretch @ axes
    key = torch.randn(1, 2, length, dim, dtype=torch.float64) * stretch.flip(0) @ axes
    return query + 0.3, key + 0.2


def fitted(query: Tensor, key: Tensor, **steps: object) -> ReparametrizedFeatures:
    phi = SharpFeatures(query.shape[-1], 1, 2, **steps)
    phi.calibrate(query, key, scale=1.0)
    features = phi.fitted(query, key, None, scale=1.0, is_streaming=True)
    assert isinstance(features, ReparametrizedFeatures)
    return features


def relative_estimates(
    phi: ReparametrizedFeatures, query: Tensor, key: Tensor, omega: Tensor, blocks: int
) -> Tensor:
    """φ(q)·φ(k) / exp(q·k) of each block of rows of ω for itself: (blocks, heads, pairs)."""
    phi = ReparametrizedFeatures(omega, phi.reparametrization)
    queries, keys = phi.query_features(query).dense()[0], phi.key_features(key).dense()[0]
    terms = torch.einsum(
        "hqbr,hkbr->bhqk", *(x.unflatten(-1, (blocks, -1)) for x in (queries, keys))
    )
    return terms.flatten(2) * blocks / (query @ key.mT)[0].flatten(1).exp()


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_is_unbiased(step, kind):
    query, key = (x / 2 for x in skewed(length=3))  # long vectors would need many more draws
    phi = fitted(query, key, **STEPS[step])
    omega = draw_projection(4001 * 5, 5, kind).double()
    assert_mean_within(relative_estimates(phi, query, key, omega, 4001), 1)


def test_a_shift_of_one_side_alone_would_be_seen():
    query, key = (x / 2 for x in skewed(length=3))
    phi = fitted(query, key)
    wrong = phi.reparametrization._replace(key_shift=phi.reparametrization.key_shift + 0.05)
    omega = draw_projection(4001 * 5, 5).double()
    queries = ReparametrizedFeatures(omega, wrong).query_features(query).dense()
    keys = ReparametrizedFeatures(omega, phi.reparametrization).key_features(key).dense()
    terms = (queries * keys).unflatten(-1, (4001, -1)).sum(dim=-1)[0, :, 0] * 4001
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(terms.mT, (query * key).sum(dim=-1)[0, :, 0].exp())


def test_every_step_lowers_the_measured_variance():
    query, key = skewed()
    omega = draw_projection(20_011, 5, "iid").double()
    variances = {}
    for step, options in STEPS.items():
        phi = fitted(query, key, **options)
        errors = relative_estimates(phi, query, key, omega, 20_011) - 1
        variances[step] = float(errors.square().mean())
    for worse, better in itertools.pairwise(variances):
        assert variances[better] < 0.97 * variances[worse], variances


@pytest.mark.parametrize("step", STEPS)
def test_the_measured_variance_is_the_closed_form(step):
    query, key = (x / 2 for x in skewed(length=3))
    phi = fitted(query, key, **STEPS[step])
    omega = draw_projection(200_003, 5, "iid").double()
    errors = relative_estimates(phi, query, key, omega, 200_003) - 1
    mapped_query = phi.query_side(query.dtype).log_linear(query).inputs[0]
    mapped_key = phi.key_side(key.dtype).log_linear(key).inputs[0]
    exponent = phi.reparametrization.exponent[:, None]
    moments = log_joint_moment_optimal(
        mapped_query, mapped_key.unsqueeze(1).expand(-1, 3, -1, -1), exponent
    )
    expected = moments.diagonal(dim1=-2, dim2=-1).expm1().flatten(1)
    assert_mean_within(errors.square(), expected)


def test_weighing_keys_by_their_attention_lowers_the_error_of_the_output():
    """A tenth of the keys receive most of the attention, as in pretrained models."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = torch.randn(3, 1, 2, 257, 8, generator=generator, dtype=torch.float64)
    query[..., 0] += 2
    key[:, :, ::10, 0] += 3
    exact = softmax_attention(query, key, value, scale=1.0)
    queries = Moments.of(query)
    errors = []
    for weight in (None, received_attention(query, key)):
        reparametrization = sharpen(queries, Moments.of(key, weight=weight))
        draws = []
        for seed in range(31):
            omega = draw_projection(64, 8, generator=torch.Generator().manual_seed(seed)).double()
            phi = ReparametrizedFeatures(omega, reparametrization)
            out = favor_attention(query, key, value, phi, scale=1.0)
            draws.append((out - exact).square().mean())
        errors.append(float(torch.stack(draws).mean()))
    assert errors[1] < 0.8 * errors[0], errors


def errors_of_attention(query_ratio: float, size: float, window_size: int | None) -> float:
    """Mean square over draws of ω, for Gaussian queries and keys of mean length 2.7 · `size`."""
    generator = torch.Generator().manual_seed(7)
    query, key, value = torch.randn(3, 1, 2, 131, 8, generator=generator, dtype=torch.float64)
    query, key = size * query, size * key
    exact = softmax_attention(query, key, value, scale=1.0)
    moments = Moments.of(query), Moments.of(key, weight=received_attention(query, key))
    reparametrization = sharpen(*moments, query_ratio=query_ratio)
    errors = []
    for seed in range(61):
        omega = draw_projection(64, 8, generator=torch.Generator().manual_seed(seed)).double()
        phi = ReparametrizedFeatures(omega, reparametrization)
        out = favor_attention(query, key, value, phi, scale=1.0, window_size=window_size)
        errors.append((out - exact).square().mean())
    return float(torch.stack(errors).mean())


@pytest.mark.parametrize("size", [0.3, 0.6, 0.9])
def test_queries_longer_than_keys_lower_the_error_of_attention(size):
    longer, equal = (errors_of_attention(ratio, size, None) for ratio in (QUERY_RATIO, 1.0))
    assert longer < 0.9 * equal


def test_beside_a_window_queries_as_long_as_keys_are_better_at_large_norms():
    longer, equal = (errors_of_attention(ratio, 1.2, 5) for ratio in (QUERY_RATIO, 1.0))
    assert equal < 0.95 * longer
