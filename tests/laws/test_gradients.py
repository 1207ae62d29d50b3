"""Gradients are those of the definition, through every tile, pass and state."""

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, backends, every_call_of, inputs
from oracle import attended
from torch import Tensor
from torch.autograd import gradcheck

from performers import KernelFeatures, LinearState, SoftmaxFeatures, favor_attention

CAUSAL = (False, True)
# Elsewhere a difference of outputs may lie across a kink.
SMOOTH = [name for name in FEATURE_MAPS if name not in ("relu", "abs")]


def small_inputs(length: int, norms: str = "1") -> list[Tensor]:
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "dim": 3, "value_dim": 2}
    return [x.requires_grad_() for x in inputs(length, dtype=torch.float64, norms=norms, **shape)]


@every_call_of(SMOOTH)
def test_gradients_are_the_slopes_of_the_output(name, is_causal, backend):
    phi = FEATURE_MAPS[name](3, 5)
    mask = torch.arange(17)[None] % 5 != 0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return favor_attention(
            query, key, value, phi, is_causal, mask, enable_gqa=True, backend=backend
        )

    assert gradcheck(attend, small_inputs(17), fast_mode=True)


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("backend", backends(has_state=True))
@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_reach_back_through_a_state(normalize, is_causal, backend):
    phi = SoftmaxFeatures(3, 5)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        state = None
        for start in (0, 8):
            piece = (x[:, :, start : start + 8] for x in (query, key, value))
            out, state = favor_attention(
                *piece,
                phi,
                is_causal,
                normalize=normalize,
                enable_gqa=True,
                initial_state=state,
                return_state=True,
                backend=backend,
            )
        # The sums themselves: the frame that they are kept in is no function of the inputs.
        scale = state.log_scale.exp()
        return out, state.normalizer * scale, state.values * scale.unsqueeze(-1)

    assert gradcheck(attend, small_inputs(16), fast_mode=True)


@every_call_of(["positive", "sharp", "exp without epsilon", "elu+1 without omega"])
@pytest.mark.parametrize("norms", ["1", "10", "growing", "shrinking", "alternating"])
def test_gradients_equal_those_of_the_definition_at_any_norm(name, norms, is_causal, backend):
    phi = FEATURE_MAPS[name](3, 5)
    tensors = small_inputs(23, norms)
    mask = MASKS["holes"](23)[1:]
    out = favor_attention(*tensors, phi, is_causal, mask, enable_gqa=True, backend=backend)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    expected = torch.autograd.grad(attended(*tensors, phi, is_causal, mask).out, tensors, cotangent)
    for gradient, true in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-12 + 1e-6 * true.abs().max())


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_many_passes_over_a_chunk_have_the_gradients_of_one(is_causal):
    # Exponents that rise by 100 a key: each needs a pass of its own within the chunk.
    phi = KernelFeatures(dim=3, fn="exp", epsilon=0.0, projection=None)
    query, key, value = small_inputs(11)
    key = (key + 100 * torch.arange(11)[:, None]).detach().requires_grad_()
    one, *others = (
        torch.autograd.grad(
            favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=backend)
            .square()
            .sum(),
            (query, key, value),
        )
        for backend in backends("exp without epsilon", is_causal)
    )
    assert others
    for other in others:
        torch.testing.assert_close(one, other)


@every_call_of(["positive", "sharp"])
def test_omega_learns_if_asked_to(name, is_causal, backend):
    phi = FEATURE_MAPS[name](3, 5)
    tensors = [x.detach() for x in small_inputs(17)]
    start = phi.omega.clone().double()

    def attend(omega: Tensor) -> Tensor:
        phi.omega = omega
        return favor_attention(*tensors, phi, is_causal, enable_gqa=True, backend=backend)

    assert gradcheck(attend, [start.requires_grad_()], fast_mode=True)


@pytest.mark.parametrize("backend", backends(has_state=True))
def test_gradients_of_a_frame_of_reference_are_not_followed(backend):
    phi = SoftmaxFeatures(3, 5)
    _, state = favor_attention(
        *small_inputs(17), phi, enable_gqa=True, return_state=True, backend=backend
    )
    assert isinstance(state, LinearState)
    assert not state.log_scale.requires_grad
    assert state.values.requires_grad
