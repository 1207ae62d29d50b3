"""Every backend computes what the definition says: a float64 log-space quadratic evaluation."""

import pytest
import torch
from cases import (
    FEATURE_MAPS,
    MASKS,
    NONNEGATIVE,
    NORMS,
    backends,
    every_call_of,
    inputs,
)
from oracle import Attended, attended
from torch import Tensor

from performers import KernelFeatures, SoftmaxFeatures, favor_attention
from performers.backends.fused_softmax import HAS_BFLOAT16

CAUSAL = (False, True)


def assert_equal_to(expected: Attended, out: Tensor, value: Tensor, relative: float) -> None:
    """Up to a relative error of A_ij's terms: |Δout| ≤ relative · condition · (max|v| + |out|).

    Rows whose normalizer cancels to less than a thousandth say nothing; half of them must be left.
    """
    clear = expected.condition < 1e3
    assert clear.float().mean() > 0.5
    size = value.abs().max() + expected.out.abs().amax(dim=-1)
    error = (out - expected.out).abs().amax(dim=-1) / (expected.condition * size)
    assert error[clear].max() <= relative


@every_call_of(FEATURE_MAPS)
def test_float32_is_within_1e_5_for_entries_up_to_10(name, is_causal, backend):
    phi, mask = FEATURE_MAPS[name](5, 11), MASKS["holes"](23)
    for norms in ("1", "10"):
        query, key, value = inputs(norms=norms)
        query, key = query.clamp(-10, 10), key.clamp(-10, 10)
        out = favor_attention(
            query, key, value, phi, is_causal, mask, enable_gqa=True, backend=backend
        )
        expected = attended(query, key, value, phi, is_causal, mask)
        assert_equal_to(expected, out, value, relative=1e-5)


@every_call_of(FEATURE_MAPS)
def test_float64_follows_any_norms_along_the_sequence(name, is_causal, backend):
    # The logits reach 1e9, where float64 still holds them to 1e-7.
    phi, mask = FEATURE_MAPS[name](5, 11), MASKS["holes"](23)
    for norms in ("1e4", "growing", "shrinking", "alternating"):
        query, key, value = inputs(norms=norms, dtype=torch.float64)
        out = favor_attention(
            query, key, value, phi, is_causal, mask, enable_gqa=True, backend=backend
        )
        expected = attended(query, key, value, phi, is_causal, mask)
        assert_equal_to(expected, out, value, relative=3e-7)


@every_call_of(["exp without epsilon"])
@pytest.mark.parametrize("norms", NORMS)
def test_float32_loses_nothing_to_the_size_of_exponents(name, norms, is_causal, backend):
    # φ(x) = exp(x): entries are exponents, one a feature. Whole numbers add without rounding, so
    # that what is left is the error of frames and sums, wherever the exponents go.
    phi = KernelFeatures(dim=7, fn="exp", epsilon=0.0, projection=None)
    for spread in (1, 50):
        query, key, value = inputs(dim=7, norms=norms)
        query, key = (spread * query).round(), (spread * key).round()
        for mask in (MASKS["no mask"](23), MASKS["holes"](23)):
            out = favor_attention(
                query, key, value, phi, is_causal, mask, enable_gqa=True, backend=backend
            )
            expected = attended(query, key, value, phi, is_causal, mask)
            assert_equal_to(expected, out, value, relative=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_call_of(NONNEGATIVE)
def test_half_precision_costs_one_rounding_of_the_output(name, is_causal, backend, dtype):
    """Where the processor multiplies bfloat16, features and their sums are rounded, too."""
    roundings = 4 if dtype == torch.bfloat16 and HAS_BFLOAT16 else 1
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs(dtype=dtype)
    out = favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
    assert out.dtype == dtype
    expected = attended(query, key, value, phi, is_causal)
    relative = 1e-5 + roundings * torch.finfo(dtype).eps / 2
    assert_equal_to(expected, out.double(), value, relative)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name in FEATURE_MAPS for backend in backends(name)]
)
def test_cross_attention_has_queries_of_its_own_length(name, mask, backend):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs(17, 29)
    mask = MASKS[mask](29)
    out = favor_attention(
        query, key, value, phi, key_padding_mask=mask, enable_gqa=True, backend=backend
    )
    assert_equal_to(attended(query, key, value, phi, False, mask), out, value, relative=1e-5)


@every_call_of(FEATURE_MAPS)
def test_without_normalizer_the_output_is_the_plain_sum(name, is_causal, backend):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs()
    arguments = (query, key, value, phi, is_causal, MASKS["left"](23), 0.5)
    out = favor_attention(*arguments, normalize=False, enable_gqa=True, backend=backend)
    expected = attended(*arguments, normalize=False).out
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_groups_of_queries_share_a_key_head(is_causal):
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs()
    grouped = favor_attention(query, key, value, phi, is_causal, enable_gqa=True)
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    repeated = favor_attention(query, key, value, phi, is_causal)
    torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_scale_is_a_temperature_of_queries_and_keys(scale):
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs(key_heads=6)
    scaled = favor_attention(query, key, value, phi, scale=scale)
    by_hand = favor_attention(query * scale**0.5, key * scale**0.5, value, phi, scale=1.0)
    torch.testing.assert_close(scaled, by_hand, rtol=1e-5, atol=1e-6)
