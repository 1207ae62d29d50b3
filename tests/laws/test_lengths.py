"""No length, width or count is too small."""

import pytest
import torch
from cases import FEATURE_MAPS, backends, every_call_of, inputs
from oracle import attended

from performers import SoftmaxFeatures, attention_matrix, favor_attention

CAUSAL = (False, True)


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("backend", backends(has_state=True))
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_an_empty_sequence_gives_an_empty_output_and_an_unchanged_state(name, is_causal, backend):
    phi = FEATURE_MAPS[name](5, 11)
    options = {"enable_gqa": True, "backend": backend, "return_state": True}
    query, key, value = (x.requires_grad_() for x in inputs(0))
    out, state = favor_attention(query, key, value, phi, is_causal, **options)
    assert out.shape == (2, 6, 0, 7)
    assert state.normalizer.eq(0).all()
    out.sum().backward()

    _, state = favor_attention(*inputs(), phi, is_causal, **options)
    _, after = favor_attention(query, key, value, phi, is_causal, initial_state=state, **options)
    assert torch.equal(after.values, state.values)
    assert torch.equal(after.log_scale, state.log_scale)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_queries_without_keys_get_zeros(name):
    query, key, value = inputs(5, 0)
    phi = FEATURE_MAPS[name](5, 11)
    for backend in (None, "reference"):
        out = favor_attention(query, key, value, phi, enable_gqa=True, backend=backend)
        assert out.shape == (2, 6, 5, 7)
        assert out.eq(0).all()


@pytest.mark.parametrize("backend", backends(has_state=True))
def test_keys_without_queries_fill_the_state(backend):
    query, key, value = inputs(0, 23)
    phi = SoftmaxFeatures(5, 11)
    options = {"enable_gqa": True, "backend": backend}
    out, state = favor_attention(query, key, value, phi, return_state=True, **options)
    assert out.shape == (2, 6, 0, 7)
    query, nothing = inputs(3)[0], (key[:, :, :0], value[:, :, :0])
    read = favor_attention(query, *nothing, phi, initial_state=state, **options)
    torch.testing.assert_close(read, favor_attention(query, key, value, phi, **options))


@every_call_of(["positive"])
@pytest.mark.parametrize("length", [1, 2, 7, 11])
@pytest.mark.parametrize(
    ("dim", "num_projections"), [(1, 1), (1, 3), (5, 1), (5, 3), (5, 5), (5, 13), (2, 31)]
)
def test_any_width_and_any_number_of_projections(
    dim, num_projections, length, name, is_causal, backend
):
    phi = FEATURE_MAPS[name](dim, num_projections)
    query, key, value = inputs(length, dim=dim, value_dim=1)
    out = favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
    expected = attended(query, key, value, phi, is_causal).out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@every_call_of(["positive", "relu"])
def test_an_empty_batch_is_no_error(name, is_causal, backend):
    phi = FEATURE_MAPS[name](5, 11)
    out = favor_attention(*inputs(batch=0), phi, is_causal, enable_gqa=True, backend=backend)
    assert out.shape == (0, 6, 23, 7)


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_values_may_have_no_columns(is_causal):
    out = favor_attention(*inputs(value_dim=0), SoftmaxFeatures(5, 11), is_causal, enable_gqa=True)
    assert out.shape == (2, 6, 23, 0)


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_the_implied_matrix_of_an_empty_sequence_is_empty(is_causal):
    query, key, _ = inputs(0)
    matrix = attention_matrix(query, key, SoftmaxFeatures(5, 11), is_causal, enable_gqa=True)
    assert matrix.shape == (2, 6, 0, 0)
