"""An exact near field: near keys scored by exp itself, far keys by features, one normalizer."""

import itertools

import pytest
import torch
from cases import BACKENDS, MASKS, NORMS, inputs
from oracle import attended

from performers import SoftmaxFeatures, favor_attention, softmax_attention

CAUSAL = (False, True)
WINDOWS = (1, 2, 7, 11, 23, 29)


def feature_map(estimator: str = "positive") -> SoftmaxFeatures:
    return SoftmaxFeatures(5, 11, estimator=estimator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("estimator", ["positive", "hyperbolic"])
@pytest.mark.parametrize("mask", ["no mask", "left", "holes", "full"])
def test_near_and_far_share_a_normalizer(mask, estimator, is_causal, backend):
    phi, mask = feature_map(estimator), MASKS[mask](23)
    tensors = inputs()
    for window_size in WINDOWS:
        options = {"enable_gqa": True, "window_size": window_size, "backend": backend}
        out = favor_attention(*tensors, phi, is_causal, mask, **options)
        expected = attended(*tensors, phi, is_causal, mask, window_size=window_size).out
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("norms", NORMS)
def test_a_window_is_right_at_any_norm(norms, is_causal, backend):
    phi, mask = feature_map(), MASKS["holes"](23)
    query, key, value = inputs(norms=norms, dtype=torch.float64)
    options = {"enable_gqa": True, "window_size": 3, "backend": backend}
    out = favor_attention(query, key, value, phi, is_causal, mask, **options)
    expected = attended(query, key, value, phi, is_causal, mask, window_size=3).out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    query, key, value = (x.float() for x in (query, key, value))
    out = favor_attention(query, key, torch.ones_like(value), phi, is_causal, **options)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", CAUSAL)
def test_a_window_of_the_whole_length_is_exact_attention(is_causal, backend):
    query, key, value = inputs()
    options = {"enable_gqa": True, "window_size": 23, "backend": backend}
    out = favor_attention(query, key, value, feature_map(), is_causal, **options)
    exact = softmax_attention(query, key, value, is_causal, enable_gqa=True)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window_size", WINDOWS)
def test_pieces_with_carried_state_equal_the_whole(window_size, backend):
    phi, mask = feature_map(), MASKS["left"](23)
    tensors = inputs()
    options = {"enable_gqa": True, "window_size": window_size, "backend": backend}
    whole = favor_attention(*tensors, phi, True, mask, **options)
    for cuts in ([5], [0, 7, 7, 20], list(range(1, 23))):
        outputs, state = [], None
        for start, stop in itertools.pairwise([0, *cuts, 23]):
            piece = (x[:, :, start:stop] for x in tensors)
            out, state = favor_attention(
                *piece,
                phi,
                True,
                mask[:, start:stop],
                initial_state=state,
                return_state=True,
                **options,
            )
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_keys_and_values_leave_earlier_outputs_bit_identical(backend):
    options = {"enable_gqa": True, "window_size": 5, "backend": backend}
    tensors = inputs()
    before = favor_attention(*tensors, feature_map(), True, **options)
    for position in (1, 6, 7, 8, 17, 22):
        later = [x.clone() for x in tensors]
        for x in later:
            x[:, :, position:] = 1e4 * torch.randn_like(x[:, :, position:])
        after = favor_attention(*later, feature_map(), True, **options)
        assert torch.equal(before[:, :, :position], after[:, :, :position])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", CAUSAL)
def test_gradients_equal_those_of_the_definition(is_causal, backend):
    phi, mask = feature_map(), MASKS["holes"](23)
    for norms in ("1", "growing"):
        tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64, norms=norms)]
        options = {"enable_gqa": True, "window_size": 3, "backend": backend}
        out = favor_attention(*tensors, phi, is_causal, mask, **options)
        cotangent = torch.randn_like(out)
        gradients = torch.autograd.grad(out, tensors, cotangent)
        expected = attended(*tensors, phi, is_causal, mask, window_size=3).out
        expected = torch.autograd.grad(expected, tensors, cotangent)
        for gradient, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-6 * true.abs().max())


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_every_backend_leaves_the_same_state(is_causal):
    tensors = inputs()
    one, other = (
        favor_attention(
            *tensors, feature_map(), is_causal, MASKS["holes"](23), enable_gqa=True, window_size=5,
            return_state=True, backend=backend,
        )[1]
        for backend in BACKENDS
    )  # fmt: skip
    frame = torch.maximum(one.log_scale, other.log_scale)
    torch.testing.assert_close(one.rescaled(frame).values, other.rescaled(frame).values)
    assert (one.recent is None) == (not is_causal)
    if is_causal:
        assert torch.equal(one.recent.key, other.recent.key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_memory_of_a_window_does_not_grow_with_the_sequence(backend):
    sizes = set()
    for length in (5, 23):
        _, state = favor_attention(
            *inputs(length), feature_map(), True, enable_gqa=True, window_size=3, return_state=True,
            backend=backend,
        )  # fmt: skip
        sizes.add(sum(x.untyped_storage().nbytes() for x in vars(state.recent).values()))
    assert len(sizes) == 1


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_an_empty_sequence_gives_an_empty_output(is_causal):
    out = favor_attention(*inputs(0), feature_map(), is_causal, enable_gqa=True, window_size=3)
    assert out.shape == (2, 6, 0, 7)
