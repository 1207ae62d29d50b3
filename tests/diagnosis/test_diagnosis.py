"""The diagnostic measures what it says, and finds the m that it says."""

import math

import pytest
import torch
from cases import MASKS, inputs

from performers import (
    KernelFeatures,
    SharpFeatures,
    SoftmaxFeatures,
    diagnose,
    favor_attention,
    softmax_attention,
)
from performers.diagnosis import compare, recommendation
from performers.functional.sharp import QUERY_RATIO
from performers.nn.estimators import ESTIMATORS


def small_inputs(**options):
    query, key, value = inputs(**options)
    return query / 2, key / 2, value


@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["no mask", "left", "right", "holes"])
def test_errors_are_those_of_attention(mask, is_causal, window_size):
    tensors, mask = small_inputs(), MASKS[mask](23)
    phi = SoftmaxFeatures(5, 11)
    options = {"is_causal": is_causal, "key_padding_mask": mask, "enable_gqa": True}
    found = diagnose(*tensors, phi, window_size=window_size, **options)
    out = favor_attention(*tensors, phi, window_size=window_size, **options)
    exact = softmax_attention(*tensors, **options)
    uniform = softmax_attention(tensors[0] * 0, *tensors[1:], **options)
    real = torch.ones(2, 1, 23, 1) if mask is None else mask[:, None, :, None]

    def relative(estimate):
        difference, size = ((estimate - exact) * real).flatten(2), (exact * real).flatten(2)
        return (difference.norm(dim=2) / size.norm(dim=2)).mean(dim=0).tolist()

    assert [head.observed_error for head in found.heads] == pytest.approx(relative(out), rel=1e-3)
    uniform_errors = [head.uniform_error for head in found.heads]
    assert uniform_errors == pytest.approx(relative(uniform), rel=1e-3)


@pytest.mark.parametrize("estimator", [e for e, row in ESTIMATORS.items() if row.log_joint_moment])
def test_the_expected_error_is_that_of_many_draws(estimator):
    query, key, value = small_inputs(length=7, batch=1, heads=2, key_heads=2)
    phi = SoftmaxFeatures(5, 1024, estimator, projection="iid")
    expected = diagnose(query, key, value, phi).heads  # 7 queries: none is left out
    exact = softmax_attention(query, key, value)
    squares = []
    for _ in range(53):
        phi.redraw()
        difference = favor_attention(query, key, value, phi) - exact
        squares.append(difference.square().sum(dim=(2, 3))[0] / exact.square().sum(dim=(2, 3))[0])
    observed = torch.stack(squares).mean(dim=0).sqrt().tolist()
    assert [head.expected_error for head in expected] == pytest.approx(observed, rel=0.25)


@pytest.mark.parametrize("window_size", [None, 3])
def test_sharp_features_have_a_closed_form_too(window_size):
    query, key, value = small_inputs(length=7, batch=1, heads=2, key_heads=1)
    phi = SharpFeatures(5, 1024, 1, projection="iid")
    phi.calibrate(query + 0.5, key)
    options = {"enable_gqa": True, "window_size": window_size}
    expected = diagnose(query, key, value, phi, **options).heads
    exact = softmax_attention(query, key, value, enable_gqa=True)
    squares = []
    for _ in range(53):
        phi.redraw()
        difference = favor_attention(query, key, value, phi, **options) - exact
        squares.append(difference.square().sum(dim=(2, 3))[0] / exact.square().sum(dim=(2, 3))[0])
    observed = torch.stack(squares).mean(dim=0).sqrt().tolist()
    assert [head.expected_error for head in expected] == pytest.approx(observed, rel=0.25)


def test_effective_features_are_all_where_scores_do_not_vary_and_one_where_one_wins():
    query, key, value = inputs(key_heads=6)
    phi = SoftmaxFeatures(5, 11)
    assert diagnose(0 * query, 0 * key, value, phi).mean("effective_features") == pytest.approx(11)
    assert diagnose(1e4 * query, 1e4 * key, value, phi).mean("effective_features") < 1.01
    whole = diagnose(query, key, value, phi, window_size=23).heads[0]
    assert whole.effective_features == 0
    assert whole.observed_error < 1e-5
    assert whole.expected_error == 0


def test_norms_are_those_of_scaled_queries_and_keys():
    query, key, value = inputs(batch=1)
    head = diagnose(query, key, value, SoftmaxFeatures(5, 11), scale=0.25, enable_gqa=True).heads[3]
    q, k = query[0, 3] / 2, key[0, 1] / 2
    assert head.query_norm == pytest.approx(float(q.norm(dim=1).mean()), rel=1e-5)
    assert head.largest_query_norm == pytest.approx(float(q.norm(dim=1).max()), rel=1e-5)
    assert head.key_norm == pytest.approx(float(k.norm(dim=1).mean()), rel=1e-5)
    assert head.largest_key_norm == pytest.approx(float(k.norm(dim=1).max()), rel=1e-5)
    pairs = (q[:, None] + k).square().sum(dim=-1).mean()
    assert head.mean_square_sum == pytest.approx(float(pairs), rel=1e-5)


def test_the_spread_of_sharp_features_is_that_of_mapped_queries_and_keys():
    query, key, value = inputs(batch=1, key_heads=6)
    phi = SharpFeatures(5, 11, 6)
    phi.calibrate(query + 2, key * torch.tensor([3.0, 1, 1, 1, 0.1]))
    found = diagnose(query, key, value, phi)
    root = 5**-0.25
    q = phi.query_side(torch.float64).log_linear(query.double() * root).inputs[0]
    k = phi.key_side(torch.float64).log_linear(key.double() * root).inputs[0]
    pairs = (q[:, :, None] + k[:, None]).square().sum(dim=-1).mean(dim=(1, 2))
    assert [head.mean_square_sum for head in found.heads] == pytest.approx(pairs.tolist())


def test_sharp_features_lower_the_spread_and_the_error():
    query, key, value = inputs(length=97, key_heads=6)
    found = compare(query + 1, key * torch.tensor([2.0, 1, 1, 1, 0.1]), value, 64, window_size=31)
    plain, sharp, windowed = found.values()
    assert sharp.mean("mean_square_sum") < plain.mean("mean_square_sum")
    assert sharp.mean("effective_features") > plain.mean("effective_features")
    for name in ("observed_error", "expected_error"):
        assert sharp.mean(name) < plain.mean(name)
    assert windowed.mean("expected_error") < sharp.mean("expected_error")
    advice = recommendation({"first": found})
    assert "Lowest with sharp" in advice
    assert "keep exact" not in advice


def test_a_causal_comparison_calibrates_on_the_first_half_and_diagnoses_the_other():
    query, key, value = small_inputs(batch=4)
    found = compare(query, key, value, 64, window_size=7, is_causal=True)
    rest = [x[2:] for x in (query, key, value)]
    for name, ratio, window_size in (("sharp", QUERY_RATIO, None), ("sharp + window", 1.0, 7)):
        phi = SharpFeatures(5, 64, 3, query_ratio=ratio)
        phi.calibrate(query[:2], key[:2])
        assert found[name] == diagnose(
            *rest, phi, is_causal=True, enable_gqa=True, window_size=window_size
        )


def test_layers_that_no_features_serve_are_named():
    query, key, value = inputs(key_heads=6)
    good = compare(query / 4, key / 4, value, 64, window_size=3)
    bad = compare(9 * query, 9 * key, value, 8, window_size=1)
    advice = recommendation({"good": good, "bad": bad})
    assert "no better than averaging the values in bad: keep exact attention there" in advice


def test_the_smallest_m_is_near_the_predicted_one_and_meets_the_target():
    query, key, value = (x / 3 for x in inputs(length=41, batch=1, key_heads=6))
    phi = SoftmaxFeatures(5, 64, projection="iid")
    found = diagnose(query, key, value, phi, target_error=0.05, max_projections=4096)
    for head in found.heads:
        assert head.predicted_projections / 4 < head.smallest_projections
        assert head.smallest_projections < 4 * head.predicted_projections
    largest = max(head.smallest_projections for head in found.heads)
    again = diagnose(query, key, value, SoftmaxFeatures(5, 2 * largest, projection="iid"))
    assert again.mean("observed_error") < 0.05


def test_a_target_out_of_reach_is_said_to_be():
    query, key, value = inputs(key_heads=6)
    phi = SoftmaxFeatures(5, 11)
    found = diagnose(query, key, value, phi, target_error=1e-4, max_projections=40)
    assert {head.smallest_projections for head in found.heads} == {None}
    assert "> 40" in str(found)
    assert found.mean("smallest_projections") == math.inf


def test_the_table_has_a_line_for_each_head():
    tensors = small_inputs()
    plain = str(diagnose(*tensors, SoftmaxFeatures(5, 11), enable_gqa=True)).splitlines()
    assert len(plain) == 1 + 6 + 1
    assert plain[0].split()[:5] == ["head", "observed", "expected", "uniform", "of"]
    sphere = SoftmaxFeatures(5, 11, distribution="sphere")
    table = str(diagnose(*tensors, sphere, enable_gqa=True, target_error=0.5))
    assert "–" in table
    assert "for an error of 0.5" in table


def test_rows_and_sequences_without_keys_count_nothing():
    query, key, value = inputs(key_heads=6)
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0] = False
    found = diagnose(query, key, value, SoftmaxFeatures(5, 11), key_padding_mask=mask)
    for head in found.heads:
        for number in vars(head).values():
            assert number is None or math.isfinite(number)
    alone = diagnose(*(x[1:] for x in (query, key, value)), SoftmaxFeatures(5, 11))
    assert found == alone


@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_diagnosed_is_refused_in_words():
    query, key, value = inputs(key_heads=6)
    phi = SoftmaxFeatures(5, 11)
    with pytest.raises(TypeError, match="SoftmaxFeatures or SharpFeatures, got KernelFeatures"):
        diagnose(query, key, value, KernelFeatures(5, 11))
    with pytest.raises(ValueError, match=r"target_error must be positive and finite, got 0\.0"):
        diagnose(query, key, value, phi, target_error=0.0)
    with pytest.raises(ValueError, match="there must be a query that sees a key"):
        diagnose(query[:0], key[:0], value[:0], phi)
    key[1, 4, 3, 2] = math.nan
    with pytest.raises(ValueError, match=r"key must be finite.*sequence 1 has NaN.* in head 4\."):
        diagnose(query, key, value, phi)
    hidden = torch.ones(2, 23, dtype=torch.bool)
    hidden[1, 3] = False
    assert diagnose(query, key, value, phi, key_padding_mask=hidden).mean("observed_error") < 5


def test_an_expected_error_beyond_the_closed_form_is_not_printed_as_a_number():
    query, key, value = small_inputs()
    query[:, 1] *= 80  # the second head alone is out of reach
    phi = SoftmaxFeatures(query.shape[-1], 997)
    found = diagnose(query, key, value, phi, enable_gqa=True, target_error=0.5, max_projections=8)
    near, far, *_ = found.heads
    assert near.expected_error < 1
    assert not far.expected_error < 1e3  # where it overflows it is not even a number
    _, first, second, *_ = str(found).splitlines()
    assert "not resolvable" in second
    assert "not resolvable" not in first
    assert second.split()[-4:] == [">", "8", ">", "8"]
    assert "e+" not in second
