"""Every derivative that PyTorch can take of attention is right: forward mode, torch.func, second.

The gradient is what all else is compared with: tests/laws/test_gradients.py has it from slopes.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, backends, every_call_with_maps_of, inputs
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from performers import (
    FavorAttention,
    KernelFeatures,
    LinearState,
    SharpFeatures,
    SoftmaxFeatures,
    favor_attention,
)
from performers.backends import plain

CAUSAL = (False, True)
NEAR = {"window_size": 2, "num_sinks": 1}
# One map for every operator, and for the general path.
OPERATORS = ["positive", "sharp", "relu", "trigonometric"]
CALLS = [
    *((name, is_causal, {}) for name in OPERATORS for is_causal in CAUSAL),
    *(("sharp", is_causal, NEAR) for is_causal in CAUSAL),
    ("positive", True, NEAR | {"far": False}),
    ("positive", False, NEAR | {"far_limit": 0.1}),
    *(("positive", is_causal, NEAR | {"far": False, "num_heavy": 2}) for is_causal in CAUSAL),
]
every_operator = pytest.mark.parametrize(("name", "is_causal", "near"), CALLS)


@pytest.fixture(autouse=True)
def chunks_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "CHUNK", 3)


def small_inputs(length: int = 7, norms: str = "1") -> tuple[Tensor, Tensor, Tensor]:
    shape = {"batch": 2, "heads": 2, "key_heads": 1, "dim": 3, "value_dim": 2}
    return inputs(length, dtype=torch.float64, norms=norms, **shape)


def loss_of(attend: Callable[..., Tensor], *tensors: Tensor) -> Callable[..., Tensor]:
    """A number that depends on every output, and on none twice alike."""
    cotangent = torch.randn_like(attend(*tensors))
    return lambda *tensors: (attend(*tensors) * cotangent).sum()


def gradients(loss: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """By backward(), through the operators."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*leaves), leaves)


def along(parts: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    return sum((part * tangent).sum() for part, tangent in zip(parts, tangents, strict=True))


def call_of(name: str, is_causal: bool, near: dict) -> Callable[..., Tensor]:
    phi = FEATURE_MAPS[name](3, 5)
    return functools.partial(favor_attention, phi=phi, is_causal=is_causal, enable_gqa=True, **near)


@pytest.mark.parametrize(("is_causal", "slope"), [(False, -0.2679847), (True, -0.1529388)])
def test_a_tangent_goes_through_attention(is_causal, slope):
    query, key, value, tangent = torch.randn(4, 1, 1, 6, 4, dtype=torch.float64).unbind()
    phi = SoftmaxFeatures(4, 8)

    def total(query: Tensor) -> Tensor:
        return favor_attention(query, key, value, phi, is_causal).sum()

    assert jvp(total, (query,), (tangent,))[1] == pytest.approx(slope, abs=1e-7)
    with forward_ad.dual_level():
        out = total(forward_ad.make_dual(query, tangent))
        assert forward_ad.unpack_dual(out).tangent == pytest.approx(slope, abs=1e-7)


@every_call_with_maps_of(FEATURE_MAPS)
def test_the_tangent_is_the_gradient_along_a_direction(names, is_causal, backend):
    for name in names:
        phi, tensors = FEATURE_MAPS[name](3, 5), small_inputs()
        attend = functools.partial(
            favor_attention, phi=phi, is_causal=is_causal, enable_gqa=True, backend=backend
        )
        loss, tangents = loss_of(attend, *tensors), tuple(torch.randn_like(x) for x in tensors)
        primal, tangent = jvp(loss, tensors, tangents)
        torch.testing.assert_close(primal, loss(*tensors), msg=name)
        expected = along(gradients(loss, tensors), tangents)
        torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("backend", backends(has_near_field=True))
@pytest.mark.parametrize("far_limit", [None, 0.1])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp"])
def test_the_tangent_beside_a_near_field_is_the_gradient_too(name, far_limit, backend, is_causal):
    near = NEAR | {"far_limit": far_limit}
    attend = functools.partial(call_of(name, is_causal, near), backend=backend)
    tensors = small_inputs()
    loss, tangents = loss_of(attend, *tensors), tuple(torch.randn_like(x) for x in tensors)
    expected = along(gradients(loss, tensors), tangents)
    torch.testing.assert_close(jvp(loss, tensors, tangents)[1], expected)


@every_operator
@pytest.mark.parametrize("norms", ["growing", "alternating"])
def test_the_formula_is_the_operator_at_any_norm_and_under_any_mask(norms, name, is_causal, near):
    if name == "trigonometric":
        norms = "1"  # whose normalizer is noise at others
    for mask in (MASKS[name] for name in ("holes", "full")):
        tensors = small_inputs(11, norms)
        attend = functools.partial(call_of(name, is_causal, near), key_padding_mask=mask(11))
        loss, tangents = loss_of(attend, *tensors), tuple(torch.randn_like(x) for x in tensors)
        primal, tangent = jvp(loss, tensors, tangents)
        torch.testing.assert_close(primal, loss(*tensors))
        found = gradients(loss, tensors)
        size = sum((part * other).abs().sum() for part, other in zip(found, tangents, strict=True))
        torch.testing.assert_close(
            tangent, along(found, tangents), rtol=1e-5, atol=1e-8 * float(size)
        )


@every_operator
def test_second_derivatives_are_the_slopes_of_the_gradient(name, is_causal, near):
    tensors = small_inputs()
    loss = loss_of(call_of(name, is_causal, near), *tensors)
    tangents = tuple(torch.randn_like(x) for x in tensors)
    leaves = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for part, expected in zip(first, gradients(loss, tensors), strict=True):
        torch.testing.assert_close(part, expected)
    second = torch.autograd.grad(along(first, tangents), leaves)

    def gradients_at(step: float) -> tuple[Tensor, ...]:
        moved = (x.detach() + step * part for x, part in zip(tensors, tangents, strict=True))
        return gradients(loss, tuple(moved))

    step = 1e-5
    for part, above, below in zip(second, gradients_at(step), gradients_at(-step), strict=True):
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(part, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))
    # the same by forward mode over reverse mode
    by_func = jvp(grad(loss, argnums=(0, 1, 2)), tuple(x.detach() for x in tensors), tangents)[1]
    for part, expected in zip(by_func, second, strict=True):
        torch.testing.assert_close(part, expected)


@every_operator
def test_gradients_per_sample_are_those_of_each_sample_alone(name, is_causal, near):
    attend, tensors = call_of(name, is_causal, near), small_inputs()

    def loss(*sample: Tensor) -> Tensor:
        return attend(*(x.unsqueeze(0) for x in sample)).square().sum()

    per_sample = vmap(grad(loss, argnums=(0, 1, 2)))(*tensors)
    expected = gradients(lambda *tensors: attend(*tensors).square().sum(), tensors)
    for part, other in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(part, other)


@every_operator
def test_jacobians_are_the_same_either_way(name, is_causal, near):
    query, key, value = small_inputs(5)
    attend = functools.partial(call_of(name, is_causal, near), key=key, value=value)
    jacobian = jacrev(attend)(query)
    torch.testing.assert_close(jacfwd(attend)(query), jacobian)
    leaf = query.requires_grad_()
    out = attend(leaf)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype)
    (batched,) = torch.autograd.grad(out, leaf, cotangents, is_grads_batched=True)
    expected = torch.tensordot(cotangents, jacobian, out.ndim)
    torch.testing.assert_close(batched, expected)


def test_a_hessian_is_symmetric():
    query, key, value = small_inputs(3)
    phi = SoftmaxFeatures(3, 5)
    loss = loss_of(
        lambda query: favor_attention(query, key, value, phi, True, enable_gqa=True), query
    )
    matrix = hessian(loss)(query).reshape(query.numel(), -1)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix.abs().max() > 1e-3


@pytest.mark.parametrize("pieces", [(4, 4), (5, 1, 1, 1)])
@pytest.mark.parametrize(
    ("name", "is_causal", "near"), [call for call in CALLS if call[1] or not call[2]]
)
def test_derivatives_reach_back_through_a_state(name, is_causal, near, pieces):
    attend, tensors = call_of(name, is_causal, near), small_inputs(8)

    def loss(*tensors: Tensor) -> Tensor:
        state, total = None, torch.zeros(())
        for piece in zip(*(x.split(pieces, dim=2) for x in tensors), strict=True):
            out, state = attend(*piece, initial_state=state, return_state=True)
            total = total + out.square().sum()
        assert isinstance(state, LinearState)
        sums = state.values * state.log_scale.exp().unsqueeze(-1)
        return total + sums.square().sum()

    tangents = tuple(torch.randn_like(x) for x in tensors)
    expected = along(gradients(loss, tensors), tangents)
    torch.testing.assert_close(jvp(loss, tensors, tangents)[1], expected)
    leaves = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    second = torch.autograd.grad(along(first, tangents), leaves)
    plain_tensors = tuple(x.detach() for x in tensors)
    by_func = jvp(grad(loss, argnums=(0, 1, 2)), plain_tensors, tangents)[1]
    for part, other in zip(by_func, second, strict=True):
        torch.testing.assert_close(part, other)
    # a state that all examples share takes the values of each
    query, key, value = plain_tensors
    both = vmap(lambda value: loss(query, key, value))(torch.stack([value, 2 * value]))
    torch.testing.assert_close(both[1], loss(query, key, 2 * value))


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("build", [lambda: SoftmaxFeatures(3, 5), lambda: KernelFeatures(3, 5)])
def test_omega_has_every_derivative_too(build, is_causal):
    phi, tensors = build(), small_inputs()
    omega = phi.omega.double()
    tangent = torch.randn_like(omega)

    def loss(omega: Tensor) -> Tensor:
        phi.omega = omega
        return favor_attention(*tensors, phi, is_causal, enable_gqa=True).square().sum()

    expected = along(gradients(loss, (omega,)), (tangent,))
    torch.testing.assert_close(jvp(loss, (omega,), (tangent,))[1], expected)
    leaf = omega.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * tangent).sum(), leaf)
    torch.testing.assert_close(jvp(grad(loss), (omega,), (tangent,))[1], second)


def test_statistics_of_a_call_are_those_of_each_sample_also_under_vmap():
    phi, tensors = SharpFeatures(3, 5, statistics="call"), small_inputs()

    def loss(*sample: Tensor) -> Tensor:
        parts = (x.unsqueeze(0) for x in sample)
        return favor_attention(*parts, phi, enable_gqa=True).square().sum()

    per_sample = vmap(grad(loss, argnums=(0, 1, 2)))(*tensors)
    expected = gradients(
        lambda *tensors: favor_attention(*tensors, phi, enable_gqa=True).square().sum(), tensors
    )
    for part, other in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(part, other)


def test_a_module_has_gradients_per_sample():
    layer = FavorAttention(6, 2).double()
    parameters, x = dict(layer.named_parameters()), torch.randn(3, 5, 6, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        rows = (x[None],) * 3
        return functional_call(layer, parameters, rows, {"need_weights": False})[0].square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(len(x)):
        alone = torch.autograd.grad(loss(parameters, x[index]), list(parameters.values()))
        for part, other in zip(per_sample.values(), alone, strict=True):
            torch.testing.assert_close(part[index], other)


COMPILED = """
import torch
from torch.func import grad, vmap
from performers import KernelFeatures, SoftmaxFeatures, favor_attention

query, key, value = torch.randn(3, 2, 1, 5, 3, dtype=torch.float64).unbind()
for phi in (SoftmaxFeatures(3, 5), KernelFeatures(3, 5)):

    def loss(*sample):
        parts = [x[None] for x in sample]
        return favor_attention(*parts, phi, is_causal=True).square().sum()

    leaf = query.clone().requires_grad_()
    out = favor_attention(leaf, key, value, phi, is_causal=True)
    (expected,) = torch.autograd.grad(out.square().sum(), leaf)
    compiled = torch.compile(vmap(grad(loss)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), expected)
print("equal")
"""


@pytest.mark.slow
def test_compiled_gradients_per_sample_are_those_of_backward(fresh_python):
    assert fresh_python(COMPILED).endswith("equal")
