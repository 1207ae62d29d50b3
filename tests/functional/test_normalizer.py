"""The softmax normalizer by itself: unbiased, its logarithm too small by what Jensen says."""

import re

import pytest
import torch
from standard_errors import assert_mean_within
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from performers.functional import positive_features
from performers.functional.normalizer import absorb_keys, approximate_cross_entropy, log_normalizer
from performers.nn import KernelFeatures, SharpFeatures, SoftmaxFeatures
from performers.nn.estimators import ESTIMATORS, Estimator
from performers.typing import Features

DIM, LENGTH, KEYS = 5, 7, 31


def features(name, num_projections=16, dim=DIM, seed=0, data=None):
    """A map of that name; sharp features are calibrated on queries and keys of one head."""
    if name != "sharp":
        return SoftmaxFeatures(dim, num_projections, estimator=name, seed=seed)
    phi = SharpFeatures(dim, num_projections, seed=seed)
    phi.calibrate(*data, scale=1.0)
    return phi


def queries_and_keys(norm=1.0, dim=DIM, batch=1, dtype=torch.float32):
    query, key = torch.randn(batch, 1, LENGTH, dim), torch.randn(batch, 1, KEYS, dim)
    return [F.normalize(x, dim=-1).to(dtype) * norm for x in (query, key)]


def exact_log_normalizer(query, key):
    return (query.double() @ key.double().mT).logsumexp(dim=-1)


def hidden_and_tokens(norm=1.0, dim=DIM, dtype=torch.float32):
    query, key = queries_and_keys(norm, dim, dtype=dtype)
    return query[0, 0], key[0, 0], torch.randint(KEYS, (LENGTH,))


def estimates(name, query, key, draws):
    """Ẑ/Z of independent draws of φ, [draws, query_length]."""
    exact = exact_log_normalizer(query, key)
    found = []
    for seed in range(draws):
        phi = features(name, seed=seed, data=(query, key))
        found.append(log_normalizer(query, phi, absorb_keys(key, phi, scale=1.0), scale=1.0))
    return (torch.stack(found).double() - exact).exp().flatten(1)


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
def test_the_normalizer_is_unbiased(name):
    query, key = queries_and_keys()
    assert_mean_within(estimates(name, query, key + 0.5, draws=150), 1)


def test_its_logarithm_is_too_small_by_half_the_relative_variance():
    ratio = estimates("hyperbolic", *queries_and_keys(norm=0.6), draws=300)
    # ratio − 1 has mean 0 and takes out most of the noise
    deficit = (ratio.log() - (ratio - 1)).mean(dim=0)
    half_variance = ratio.var(dim=0) / 2
    assert (half_variance > 1e-4).all()
    torch.testing.assert_close(deficit, -half_variance, rtol=0.2, atol=0)


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
def test_at_small_norms_it_is_exact(name):
    query, key = queries_and_keys(norm=0.01)
    phi = features(name, data=(query, key))
    found = log_normalizer(query, phi, absorb_keys(key, phi, scale=1.0), scale=1.0)
    torch.testing.assert_close(found.double(), exact_log_normalizer(query, key), atol=0.03, rtol=0)


def test_without_keys_it_is_minus_infinity():
    query, key = queries_and_keys()
    phi = features("positive")
    found = log_normalizer(query, phi, absorb_keys(key[:, :, :0], phi))
    assert (found == -torch.inf).all()


def test_it_is_the_logarithm_of_the_features_inner_products():
    query, key = queries_and_keys(norm=3.0, batch=2, dtype=torch.float64)
    phi = features("positive")
    dense = phi.query_features(query).dense() @ phi.key_features(key).dense().mT
    found = log_normalizer(query, phi, absorb_keys(key, phi, scale=1.0), scale=1.0)
    torch.testing.assert_close(found, dense.sum(dim=-1).log())


def test_the_scale_of_attention_is_the_default():
    query, key = queries_and_keys(norm=3.0)
    phi = features("positive")
    found = log_normalizer(query, phi, absorb_keys(key, phi))
    root = DIM**-0.25
    unscaled = absorb_keys(root * key, phi, scale=1.0)
    torch.testing.assert_close(found, log_normalizer(root * query, phi, unscaled, scale=1.0))


@pytest.mark.parametrize("norm", [100.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_finite_at_every_norm(norm, dtype):
    query, key = queries_and_keys(norm=norm, dtype=dtype)
    phi = features("positive")
    found = log_normalizer(query, phi, absorb_keys(key, phi, scale=1.0), scale=1.0)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_key_sets_absorbed_apart_and_merged_are_one_key_set():
    query, key = queries_and_keys(norm=3.0)
    phi = features("positive")
    parts = [absorb_keys(part, phi) for part in key.split([11, 20], dim=2)]
    whole = absorb_keys(key, phi)
    torch.testing.assert_close(
        log_normalizer(query, phi, parts[0].merge(parts[1])), log_normalizer(query, phi, whole)
    )


def test_padding_has_no_part_in_the_normalizer():
    query, key = queries_and_keys()
    phi = features("positive")
    mask = (torch.arange(KEYS) < 13)[None]
    key[:, :, 13:] = torch.nan
    torch.testing.assert_close(
        log_normalizer(query, phi, absorb_keys(key, phi, mask)),
        log_normalizer(query, phi, absorb_keys(key[:, :, :13], phi)),
    )


def test_one_state_serves_queries_of_any_batch_and_length():
    query, key = queries_and_keys(batch=3)
    query = query.repeat(1, 1, 79, 1)  # longer than a tile
    phi = features("positive")
    state = absorb_keys(key[:1], phi)
    found = log_normalizer(query, phi, state)
    alone = torch.cat([log_normalizer(one, phi, state) for one in query.split(1)])
    assert found.shape == (3, 1, 553)
    torch.testing.assert_close(found, alone)


def test_cross_entropy_has_the_target_exact_and_the_others_estimated():
    hidden, tokens, targets = hidden_and_tokens(norm=2.0, dtype=torch.float64)
    phi = features("positive")
    kernel = phi.query_features(hidden).dense() @ phi.key_features(tokens).dense().mT
    logit = (hidden * tokens[targets]).sum(dim=-1)
    others = kernel.scatter(1, targets[:, None], 0.0).sum(dim=1)
    torch.testing.assert_close(
        approximate_cross_entropy(hidden, tokens, targets, phi, reduction="none"),
        (logit.exp() + others).log() - logit,
    )


def test_it_does_not_matter_whether_features_come_as_values_or_as_exponents(monkeypatch):
    def as_values(x, omega):
        return Features(values=positive_features(x, omega).dense())

    monkeypatch.setitem(ESTIMATORS, "toy", Estimator(as_values, is_nonnegative=True))
    hidden, tokens, targets = hidden_and_tokens(norm=2.0, dtype=torch.float64)
    losses = (
        approximate_cross_entropy(hidden, tokens, targets, features(name), reduction="none")
        for name in ("positive", "toy")
    )
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_at_small_norms_cross_entropy_and_its_reductions_are_those_of_torch(reduction):
    hidden, tokens, targets = hidden_and_tokens(norm=0.01)
    targets[2] = -100
    torch.testing.assert_close(
        approximate_cross_entropy(
            hidden, tokens, targets, features("positive", 256), reduction=reduction
        ),
        F.cross_entropy(hidden @ tokens.T, targets, reduction=reduction),
        atol=0.03,
        rtol=0,
    )


def test_cross_entropy_takes_any_batch_dimensions():
    hidden, tokens, targets = hidden_and_tokens()
    hidden, targets = hidden.expand(2, 3, LENGTH, DIM), targets.expand(2, 3, LENGTH)
    losses = approximate_cross_entropy(
        hidden, tokens, targets, features("positive"), reduction="none"
    )
    assert losses.shape == (2, 3, LENGTH)
    torch.testing.assert_close(losses, losses[:1, :1].expand(2, 3, LENGTH))


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
def test_cross_entropy_has_the_gradients_of_its_definition(name):
    hidden, tokens, targets = hidden_and_tokens(dtype=torch.float64)
    phi = features(name, data=(hidden[None, None], tokens[None, None]))

    def loss(hidden, tokens):
        return approximate_cross_entropy(hidden, tokens, targets, phi)

    inputs = (hidden.requires_grad_(), tokens.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


def test_log_normalizer_is_differentiable_in_queries_and_keys():
    query, key = queries_and_keys(dtype=torch.float64)
    phi = features("positive")

    def estimate(query, key):
        return log_normalizer(query, phi, absorb_keys(key, phi))

    inputs = (query.requires_grad_(), key.requires_grad_())
    assert torch.autograd.gradcheck(estimate, inputs, fast_mode=True)


@pytest.mark.parametrize("norm", [1.0, 10.0, 100.0])
def test_cross_entropy_and_its_gradients_are_finite_and_never_below_0(norm):
    hidden, tokens, _ = hidden_and_tokens(norm=norm)
    hidden.requires_grad_()
    tokens.requires_grad_()
    best = (hidden @ tokens.T).argmax(dim=1)
    losses = approximate_cross_entropy(hidden, tokens, best, features("positive"), reduction="none")
    losses.sum().backward()
    assert (losses >= 0).all()
    assert hidden.grad.isfinite().all()
    assert tokens.grad.isfinite().all()


def test_without_targets_there_is_no_loss():
    hidden, tokens, targets = hidden_and_tokens()
    hidden.requires_grad_()
    nothing = torch.full_like(targets, -100)
    phi = features("positive")
    losses = approximate_cross_entropy(hidden, tokens, nothing, phi, reduction="none")
    losses.sum().backward()
    assert (losses == 0).all()
    assert (hidden.grad == 0).all()
    assert approximate_cross_entropy(hidden, tokens, nothing, phi).isnan()  # as in torch


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
def test_a_hidden_vector_of_nan_has_a_loss_of_nan_and_the_others_keep_theirs(name):
    hidden, tokens, targets = hidden_and_tokens()
    phi = features(name, data=(hidden[None, None], tokens[None, None]))
    expected = approximate_cross_entropy(hidden, tokens, targets, phi, reduction="none")
    hidden[3, 1] = expected[3] = torch.nan
    losses = approximate_cross_entropy(hidden, tokens, targets, phi, reduction="none")
    torch.testing.assert_close(losses, expected, equal_nan=True)


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
@pytest.mark.parametrize("count", [1, 13])
def test_an_embedding_of_nan_makes_every_loss_nan_as_in_torch(name, count):
    hidden, tokens, targets = hidden_and_tokens()
    tokens, targets = tokens[:count], targets % count
    phi = features(name, data=(hidden[None, None], tokens[None, None]))
    tokens[count // 2, 2] = torch.nan
    losses = approximate_cross_entropy(hidden, tokens, targets, phi, reduction="none")
    exact = torch.nn.functional.cross_entropy(hidden @ tokens.T, targets, reduction="none")
    assert losses.isnan().tolist() == exact.isnan().tolist() == [True] * len(hidden)


@pytest.mark.parametrize("norm", [0.0, 1.0])  # at 0 the others are 0 without any rounding
def test_a_vocabulary_of_one_token_has_no_loss(norm):
    hidden = torch.randn(LENGTH, DIM, requires_grad=True)
    tokens, targets = norm * torch.randn(1, DIM), torch.zeros(LENGTH, dtype=torch.int64)
    loss = approximate_cross_entropy(hidden, tokens, targets, features("positive"))
    loss.backward()
    torch.testing.assert_close(loss, torch.zeros(()), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.zeros(LENGTH, DIM), atol=1e-6, rtol=0)


def test_training_on_the_approximate_loss_lowers_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    hidden, tokens, targets = hidden_and_tokens(norm=0.5)
    hidden.requires_grad_()
    tokens.requires_grad_()
    optimizer = torch.optim.Adam([hidden, tokens], lr=0.03)
    phi = features("hyperbolic", 64)
    exact = [F.cross_entropy(hidden @ tokens.T, targets).item()]
    for _ in range(40):
        phi.redraw(generator)
        optimizer.zero_grad()
        approximate_cross_entropy(hidden, tokens, targets, phi).backward()
        optimizer.step()
    exact.append(F.cross_entropy(hidden @ tokens.T, targets).item())
    assert exact[1] < exact[0] - 1


def test_features_that_fit_each_call_are_sharper():
    hidden, tokens, targets = hidden_and_tokens()
    hidden, tokens = hidden + 1, tokens + 1  # a common direction, as hidden states have
    exact = F.cross_entropy(hidden @ tokens.T, targets, reduction="none")
    errors = {}
    for name, build in {"plain": SoftmaxFeatures, "sharp": SharpFeatures}.items():
        options = {} if name == "plain" else {"statistics": "call"}
        found = [
            approximate_cross_entropy(
                hidden, tokens, targets, build(DIM, 64, seed=seed, **options), reduction="none"
            )
            for seed in range(11)
        ]
        errors[name] = (torch.stack(found) - exact).square().mean().sqrt()
    assert errors["sharp"] < errors["plain"] / 2


def test_cost_grows_with_targets_plus_tokens_not_with_their_product():
    phi = features("positive", 8)

    def operations(targets, tokens):
        hidden = torch.randn(targets, DIM, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            approximate_cross_entropy(
                hidden, torch.randn(tokens, DIM), torch.zeros(targets, dtype=torch.int64), phi
            ).backward()
        return counter.get_total_flops()

    few, many = operations(101, 211), operations(202, 211)
    assert many > few
    assert operations(202, 1511) - operations(101, 1511) == many - few


@pytest.mark.parametrize(
    "phi", [SoftmaxFeatures(DIM, estimator="trigonometric"), KernelFeatures(DIM)]
)
def test_features_without_a_positive_softmax_estimate_are_refused(phi):
    query, key = queries_and_keys()
    with pytest.raises(ValueError, match="needs a nonnegative estimate of the softmax kernel"):
        absorb_keys(key, phi)
    with pytest.raises(ValueError, match="needs a nonnegative estimate of the softmax kernel"):
        log_normalizer(query, phi, absorb_keys(key, features("positive")))


def test_statistics_of_a_call_cannot_serve_queries_to_come():
    _, key = queries_and_keys()
    with pytest.raises(ValueError, match='Use statistics="calibrated"'):
        absorb_keys(key, SharpFeatures(DIM, statistics="call"))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden": torch.zeros(7, 6)}, ValueError, "with the dim of hidden: hidden is (7, 6)"),
        ({"targets": torch.zeros(6).long()}, ValueError, "one target per hidden vector"),
        ({"targets": torch.zeros(7)}, TypeError, "must be int64 indices, got torch.float32"),
        ({"targets": torch.full((7,), 31)}, ValueError, "0 … 30 or ignore_index=-100, got 31"),
        ({"reduction": "men"}, ValueError, "unknown reduction 'men'"),
    ],
)
def test_wrong_inputs_are_named(change, error, words):
    hidden, tokens, targets = hidden_and_tokens()
    arguments = {"hidden": hidden, "output_embeddings": tokens, "targets": targets, **change}
    with pytest.raises(error, match=re.escape(words)):
        approximate_cross_entropy(**arguments, phi=features("positive"))
