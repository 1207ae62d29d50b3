"""No NaN at any norm, and no epsilon: attention returns averages of the values, always.

NaN comes out only where it went in, and there it does come out.
"""

import itertools

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, NONNEGATIVE, NORMS, backends, every_call_with_maps_of, inputs

from performers import KernelFeatures, SoftmaxFeatures, favor_attention

CAUSAL = (False, True)
OF_ANY_SIGN = [name for name in FEATURE_MAPS if name not in NONNEGATIVE]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@every_call_with_maps_of(NONNEGATIVE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", NORMS)
def test_outputs_lie_among_the_values_at_any_norm(norms, dtype, is_causal, backend, names):
    query, key, value = inputs(dtype=dtype, norms=norms)
    low, high = value.amin(dim=2, keepdim=True), value.amax(dim=2, keepdim=True)
    low, high = (x.repeat_interleave(2, dim=1) for x in (low, high))
    slack = 1e-5 + torch.finfo(dtype).eps
    for name in names:
        phi = FEATURE_MAPS[name](5, 11)
        out = favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
        assert (out >= low - slack * low.abs()).all(), name  # false for NaN as well
        assert (out <= high + slack * high.abs()).all(), name


@pytest.mark.parametrize("window_size", [None, 4])
@pytest.mark.parametrize("size", [1e14, 1e17, 1e18])
def test_up_to_the_overflow_of_squares_every_backend_finds_the_largest_logit(size, window_size):
    query, key, value = inputs(heads=3)
    query, key = size * query, size * key
    for name in ("positive", "sharp"):
        phi = FEATURE_MAPS[name](5, 11)
        calls = {"window_size": window_size, "key_padding_mask": MASKS["left"](23)}
        wide = (x.double() for x in (query, key, value))
        expected = favor_attention(*wide, phi, backend="reference", **calls).float()
        for backend in backends(name, has_near_field=window_size is not None):
            out = favor_attention(query, key, value, phi, backend=backend, **calls)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5, msg=f"{name} {backend}")


@every_call_with_maps_of(NONNEGATIVE)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("norms", ["1", "10", "growing", "huge then tiny"])
def test_attention_over_ones_is_one(norms, dtype, is_causal, backend, names):
    query, key, value = inputs(norms=norms)
    query, key, value = (x.clamp(-6e4, 6e4).to(dtype) for x in (query, key, torch.ones_like(value)))
    for name in names:
        phi = FEATURE_MAPS[name](5, 11)
        out = favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
        assert (out - 1).abs().max() <= 2e-6, name


@every_call_with_maps_of(OF_ANY_SIGN)
@pytest.mark.parametrize("norms", NORMS)
def test_features_of_any_sign_stay_finite(norms, is_causal, backend, names):
    query, key, value = inputs(norms=norms)
    for name in names:
        phi = FEATURE_MAPS[name](5, 11)
        out = favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
        assert out.isfinite().all(), name


@every_call_with_maps_of(FEATURE_MAPS)
def test_nan_reaches_every_row_that_meets_it(is_causal, backend, names):
    for name, place in itertools.product(names, (0, 1, 2)):
        tensors = inputs(heads=3)
        tensors[place][:, :, 13] = torch.nan
        out = favor_attention(*tensors, FEATURE_MAPS[name](5, 11), is_causal, backend=backend)
        rows = slice(13, 14) if place == 0 else slice(13 if is_causal else 0, None)
        assert out[:, :, rows].isnan().all(), (name, place)


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("norms", NORMS)
def test_gradients_are_finite_at_any_norm(norms, is_causal):
    for name in NONNEGATIVE:
        tensors = [x.requires_grad_() for x in inputs(norms=norms)]
        mask = MASKS["left"](23)
        out = favor_attention(*tensors, FEATURE_MAPS[name](5, 11), is_causal, mask, enable_gqa=True)
        out.sum().backward()
        for x in tensors:
            assert x.grad.isfinite().all(), name


@pytest.mark.parametrize("rise", [0.0, 1.0, 5.0, 30.0])
def test_values_of_a_million_do_not_overflow_beside_rising_keys(rise, monkeypatch):
    # Within a causal chunk keys may rise above the chunk's frame, and weigh far more than 1 until
    # the division. φ(x) = exp(x), so that entries are exponents; all features rise together.
    monkeypatch.undo()  # the tiles that users get
    phi = KernelFeatures(256, fn="exp", epsilon=0.0, projection=None)
    key = (rise * torch.arange(257.0))[:, None].expand(1, 1, 257, 256)
    value = torch.full((1, 1, 257, 2), 1e6)
    out, state = favor_attention(key, key, value, phi, is_causal=True, return_state=True)
    torch.testing.assert_close(out, value, rtol=1e-5, atol=0)
    assert state.values.isfinite().all()


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_a_default_chunk_is_as_safe_as_a_small_one(is_causal, monkeypatch):
    monkeypatch.undo()  # the sizes that users get
    phi = SoftmaxFeatures(16, 37)
    for norms in ("1", "growing", "one huge key"):
        query, key, value = inputs(523, heads=2, key_heads=2, dim=16, norms=norms)
        out = favor_attention(query, key, value, phi, is_causal)
        ones = favor_attention(query, key, torch.ones_like(value), phi, is_causal)
        reference = favor_attention(query, key, value, phi, is_causal, backend="reference")
        assert out.isfinite().all()
        torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-5, atol=0)
        if norms == "1":
            torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
