"""The implied matrix is the one that attention multiplies its values by."""

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, inputs

from performers import SoftmaxFeatures, attention_matrix, favor_attention, softmax_attention
from performers.functional import implied_matrix, readout


@pytest.fixture(autouse=True)
def _several_blocks_of_columns(monkeypatch):
    monkeypatch.setattr(readout, "COLUMNS_PER_BLOCK", 7)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_appendix_c4_the_matrix_times_the_values_is_the_output(name, normalize, is_causal):
    phi, mask = FEATURE_MAPS[name](5, 11), MASKS["holes"](23)
    query, key, value = inputs(dtype=torch.float64)
    options = {"normalize": normalize, "enable_gqa": True}
    matrix = attention_matrix(query, key, phi, is_causal, mask, **options)
    assert matrix.shape == (2, 6, 23, 23)
    out = favor_attention(query, key, value, phi, is_causal, mask, **options)
    torch.testing.assert_close(matrix @ value.repeat_interleave(2, dim=1), out)
    hidden = ~mask[:, None, None, :].expand_as(matrix)
    assert matrix[hidden].eq(0).all()
    if is_causal:
        assert matrix.triu(1).eq(0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_a_normalized_matrix_are_distributions(is_causal):
    query, key, _ = inputs()
    matrix = attention_matrix(query, key, SoftmaxFeatures(5, 11), is_causal, enable_gqa=True)
    assert matrix.ge(0).all()
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(2, 6, 23))


def test_a_window_shows_in_the_matrix():
    query, key, _ = inputs(key_heads=6)
    matrix = attention_matrix(query, key, SoftmaxFeatures(5, 11), window_size=23)
    exact = (query @ key.mT / 5**0.5).softmax(dim=-1)
    torch.testing.assert_close(matrix, exact)


def test_cross_attention_has_a_rectangular_matrix():
    query, key, _ = inputs(3, 29, key_heads=6)
    assert attention_matrix(query, key, SoftmaxFeatures(5, 11)).shape == (2, 6, 3, 29)


def test_any_mechanism_that_is_linear_in_its_values_can_be_read():
    query, key, _ = inputs(key_heads=6)
    matrix = implied_matrix(lambda value: softmax_attention(query, key, value), key)
    torch.testing.assert_close(matrix, (query @ key.mT / 5**0.5).softmax(dim=-1))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.3},
        {"window_size": 3},
        {"window_size": 3, "num_sinks": 2},
        {"window_size": 3, "far": False},
    ],
)
def test_each_option_of_attention_is_one_of_the_matrix(options):
    query, key, value = inputs(key_heads=6)
    phi = SoftmaxFeatures(5, 11)
    matrix = attention_matrix(query, key, phi, **options)
    torch.testing.assert_close(matrix @ value, favor_attention(query, key, value, phi, **options))
    *others, last = options
    without = attention_matrix(query, key, phi, **{name: options[name] for name in others})
    assert not torch.allclose(matrix, without), f"{last} must make a difference"
