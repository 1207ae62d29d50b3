"""When the landmarks serve, and in which precision they multiply."""

import pytest
import torch

from performers import SoftmaxFeatures, favor_attention
from performers.backends import Call, landmarks


@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_bfloat16_is_multiplied_where_the_processor_can(monkeypatch, has_bfloat16):
    monkeypatch.setattr(landmarks, "HAS_BFLOAT16", has_bfloat16)
    expected = {
        torch.bfloat16: torch.bfloat16 if has_bfloat16 else torch.float32,
        torch.float16: torch.float32,  # which could not hold the weights
        torch.float32: torch.float32,
        torch.float64: torch.float64,
    }
    assert {dtype: landmarks._product_dtype(dtype) for dtype in expected} == expected


@pytest.mark.parametrize(
    ("query_length", "key_length", "is_served"), [(0, 2, False), (2, 0, False), (1, 1, True)]
)
def test_they_need_a_query_and_a_key(query_length, key_length, is_served):
    phi = SoftmaxFeatures(1, 3)
    query, key = torch.ones(1, 1, query_length, 1), torch.ones(1, 1, key_length, 1)
    call = Call(phi, 1.0, False, True, None, False, torch.float32)
    reason = landmarks.refusal(call, query, key, key)
    assert reason == (
        None if is_served else "its fused kernel needs at least one query and one key"
    )
    out = favor_attention(query, key, key, phi)  # by another backend, if need be
    assert torch.equal(out, query if key_length else query * 0)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_sums_that_are_not_divided_are_those_of_the_definition(scale):
    query, key, value = torch.randn(3, 2, 3, 7, 5).unbind()
    options = {"scale": scale, "normalize": False}
    phi = SoftmaxFeatures(5, 11)
    found = favor_attention(query, key, value, phi, **options, backend="landmarks")
    expected = favor_attention(query, key, value, phi, **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
