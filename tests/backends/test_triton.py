"""The Triton kernels compute what the reference defines, on a GPU or in Triton's interpreter.

The interpreter takes a second for what a GPU does in microseconds, so sizes are the least that have
several tiles of rows and of features. Its bfloat16 products are not those of a GPU; bfloat16 inputs
are tested with products of float32.
"""

import functools
import itertools
import re

import pytest
import torch
from cases import FEATURE_MAPS, NORMS
from torch import Tensor

from performers import KernelFeatures, LinearState, SharpFeatures, SoftmaxFeatures, favor_attention
from performers.backends import Call, choose_backend
from performers.nn import RandomFeatures

config = pytest.importorskip("performers.backends.triton.config")
maps = pytest.importorskip("performers.backends.triton.maps")
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The feature maps that the kernels compute; they refuse the others.
MAPS = [
    name
    for name, build in FEATURE_MAPS.items()
    if maps.kernel_map(build(5, 3), torch.empty(1, 5)) is not None
]
REFUSED = [name for name in FEATURE_MAPS if name not in MAPS]
CAUSAL = (False, True)

pytestmark = pytest.mark.usefixtures("small_tiles", "poisoned_memory")
both_ways = pytest.mark.parametrize("is_causal", CAUSAL)
without_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="the kernels of a GPU are at hand")


def feature_map(name: str, num_projections: int = 19) -> RandomFeatures:
    """A map of dim 5 with two blocks of features (hyperbolic: three)."""
    if name == "sharp":
        return sharp_map(1, num_projections)
    return FEATURE_MAPS[name](5, num_projections).to(DEVICE)


def sharp_map(num_heads: int, num_projections: int = 7) -> SharpFeatures:
    """Sharp features that have learned something, for each head something else."""
    phi = SharpFeatures(5, num_projections, num_heads=num_heads)
    spread = torch.tensor([1.0, 3.0, 1.0, 0.2, 1.0])
    query, key = (torch.randn(1, num_heads, 50, 5) for _ in range(2))
    phi.calibrate(query * 0.7 + 0.4, key * spread * 0.5)
    return phi.to(DEVICE)


def inputs(
    length: int = 17, key_length: int | None = None, norms: str = "1", dtype=torch.float32
) -> list[Tensor]:
    """One sequence, two query heads to one key head, with gradients to come."""
    key_length = length if key_length is None else key_length
    query = torch.randn(1, 2, length, 5) * NORMS[norms](length)[:, None]
    key = torch.randn(1, 1, key_length, 5) * NORMS[norms](key_length)[:, None]
    tensors = (query, key, torch.randn(1, 1, key_length, 3))
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors]


def attend(tensors: list[Tensor], phi: RandomFeatures, is_causal: bool, **options: object):
    """By the kernels."""
    return favor_attention(*tensors, phi, is_causal, enable_gqa=True, backend="triton", **options)


def defined(tensors: list[Tensor], phi: RandomFeatures, is_causal: bool, **options: object):
    """By the reference, in float64."""
    return favor_attention(
        *tensors, phi, is_causal, enable_gqa=True, backend="reference", **options
    )


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().double().requires_grad_() for x in tensors]


def weights_like(x: Tensor) -> Tensor:
    """The same for float32 and float64."""
    return torch.arange(x.numel(), device=x.device).view_as(x).cos()


def sums(state: LinearState) -> list[Tensor]:
    """What a state stands for, whatever its frame."""
    scale = state.log_scale.double().exp()
    return [state.normalizer * scale, state.values * scale.unsqueeze(-1)]


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    error = (actual.double() - expected).abs().max()
    assert error <= relative * expected.abs().max(), f"{error:.1e} of {expected.abs().max():.1e}"


@both_ways
@pytest.mark.parametrize("name", MAPS)
def test_outputs_states_and_gradients_are_those_of_the_definition(name, is_causal):
    phi, tensors = feature_map(name), inputs(17, None if is_causal else 19)
    mask = (torch.arange(tensors[1].shape[2], device=DEVICE) % 5 != 1)[None]
    results = []
    for compute, leaves in ((attend, tensors), (defined, doubles(tensors))):
        earlier = [x[:, :, :3] for x in leaves]
        _, first = defined(earlier, phi, is_causal, return_state=True)
        later = [x[:, :, 3:] for x in leaves]
        out, state = compute(
            later, phi, is_causal, key_padding_mask=mask[:, 3:], initial_state=first,
            return_state=True,
        )  # fmt: skip
        outputs = [out, *sums(state)]
        loss = sum(
            (x * torch.arange(x.numel(), device=DEVICE).view_as(x).cos()).sum() for x in outputs
        )
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


@both_ways
@pytest.mark.parametrize("name", ["positive", "sharp", "relu"])
def test_without_the_normalizer_too(name, is_causal):
    phi, tensors = feature_map(name, 7), inputs(11)
    wide = doubles(tensors)
    out, expected = (
        compute(x, phi, is_causal, normalize=False)
        for compute, x in ((attend, tensors), (defined, wide))
    )
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, tensors, cotangent)
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, wide, cotangent.double()), strict=True
    ):
        assert_close(mine, theirs)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_no_more_than_rounding(dtype, is_causal, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setitem(config.OPERANDS, dtype, config.OPERANDS[torch.float32])
    phi, tensors = feature_map("positive", 7), inputs(17, dtype=dtype)
    wide = doubles(tensors)
    out, expected = attend(tensors, phi, is_causal), defined(wide, phi, is_causal)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert_close(out, expected, relative=rounding)
    for mine, theirs in zip(
        torch.autograd.grad(out.sum(), tensors[:1]),
        torch.autograd.grad(expected.sum(), wide[:1]),
        strict=True,
    ):
        assert (mine - theirs).abs().max() <= 4 * rounding


def test_omega_in_two_halves_keeps_its_precision():
    operand = config.OPERANDS[torch.bfloat16]
    omega = torch.randn(101)
    high = omega.to(operand.dtype)
    low = (omega - high).to(operand.dtype)
    assert operand.is_split
    torch.testing.assert_close(high.float() + low.float(), omega, rtol=2**-16, atol=0)


@pytest.mark.parametrize("norms", ["10", "growing", "alternating", "one huge key"])
def test_causal_attention_follows_any_norms_along_the_sequence(norms):
    # Exponents that rise by far more than 60 within a chunk: rows from there on are summed term by
    # term. Norms stay below 100, so that float32 still has the logits to 1e-3.
    phi = feature_map("positive", 19 if norms == "alternating" else 7)
    tensors = [x.detach().clamp(-100, 100).requires_grad_() for x in inputs(19, norms=norms)]
    wide = doubles(tensors)
    out, expected = attend(tensors, phi, True), defined(wide, phi, True)
    assert_close(out, expected, relative=3e-4)
    cotangent = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(out, tensors, cotangent),
        torch.autograd.grad(expected, wide, cotangent.double()),
        strict=True,
    ):
        assert_close(mine, theirs, relative=1e-2)


@both_ways
def test_entries_of_1e4_are_finite_and_their_gradients_too(is_causal):
    phi, tensors = feature_map("positive", 7), inputs(17, norms="1e4")
    tensors[2] = torch.ones_like(tensors[2]).requires_grad_()
    out = attend(tensors, phi, is_causal)
    torch.testing.assert_close(out, torch.ones_like(out))
    for gradient in torch.autograd.grad(out.square().sum(), tensors):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("norms", "position"), [("1", 3), ("1", 18), ("alternating", 3)])
def test_the_future_leaves_the_past_bit_identical(norms, position):
    phi = feature_map("positive", 7)
    query, key, value = (x.detach() for x in inputs(19, norms=norms))
    out = attend([query, key, value], phi, True)
    key, value = key.clone(), value.clone()
    key[:, :, position:] = phi.omega[0] / phi.default_scale**0.5  # largest exponent of a feature
    value[:, :, position:] += 1e3
    changed = attend([query, key, value], phi, True)
    assert torch.equal(changed[:, :, :position], out[:, :, :position])
    assert not torch.equal(changed[:, :, position:], out[:, :, position:])


@both_ways
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_rows_that_see_no_key_are_zero_with_zero_gradients(name, is_causal):
    phi, tensors = feature_map(name, 7), inputs(19)
    visible = torch.arange(19, device=DEVICE) >= (18 if is_causal else 19)
    out = attend(tensors, phi, is_causal, key_padding_mask=visible[None])
    blind = slice(0, 18 if is_causal else 19)
    assert out[:, :, blind].eq(0).all()
    assert out.isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), tensors):
        assert gradient.isfinite().all()
        assert gradient[:, :, blind].eq(0).all()


def test_left_padding_shifts_a_causal_sequence():
    phi, tensors = feature_map("positive", 7), inputs(21)
    mask = (torch.arange(21, device=DEVICE) >= 5)[None]
    alone = attend([x[:, :, 5:] for x in tensors], phi, True)
    padded = attend(tensors, phi, True, key_padding_mask=mask)
    torch.testing.assert_close(padded[:, :, 5:], alone)


@pytest.mark.parametrize("name", MAPS)
def test_prefill_and_decoding_equal_the_whole(name):
    phi, tensors = feature_map(name, 7), [x.detach() for x in inputs(20)]
    whole = attend(tensors, phi, True)
    outputs, state = [], None
    for start, stop in itertools.pairwise([0, 17, 18, 19, 20]):
        piece = [x[:, :, start:stop] for x in tensors]
        out, state = attend(piece, phi, True, initial_state=state, return_state=True)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole)
    _, expected = defined(doubles(tensors), phi, True, return_state=True)
    for mine, theirs in zip(sums(state), sums(expected), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["positive", "relu"])
def test_a_state_may_come_in_any_frame(name):
    phi, tensors = feature_map(name, 7), [x.detach() for x in inputs(3)]
    _, state = attend(tensors, phi, True, return_state=True)
    shifted = state.rescaled(state.log_scale + 1.5)
    outputs = [attend(tensors, phi, True, initial_state=first) for first in (state, shifted)]
    torch.testing.assert_close(*outputs)


def test_a_decoding_step_has_the_gradients_of_the_definition():
    phi, tensors = feature_map("positive", 7), inputs(1)
    wide = doubles(tensors)
    results = []
    for compute, leaves in ((attend, tensors), (defined, wide)):
        _, first = defined([x * 2 for x in leaves], phi, True, return_state=True)
        out = compute(leaves, phi, True, initial_state=first)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert_close(mine, theirs)


def test_a_masked_token_leaves_the_state_as_it_was():
    phi, tensors = feature_map("positive", 7), [x.detach() for x in inputs(1)]
    _, state = attend(tensors, phi, True, return_state=True)
    hidden = torch.zeros(1, 1, dtype=torch.bool, device=DEVICE)
    _, after = attend(
        [x + 1 for x in tensors], phi, True, key_padding_mask=hidden, initial_state=state,
        return_state=True,
    )  # fmt: skip
    for mine, theirs in zip(sums(after), sums(state), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_several_splits_of_the_keys_equal_one(monkeypatch):
    attention = pytest.importorskip("performers.backends.triton.attention")
    phi, tensors = feature_map("positive", 7), inputs(16, 53)
    outputs = []
    for count in (1, 3):
        monkeypatch.setattr(attention, "_waves", lambda *_, count=count: count)
        outputs.append(attend(tensors, phi, False))
    torch.testing.assert_close(*outputs)


def test_causal_segments_are_one_sequence(monkeypatch):
    attention = pytest.importorskip("performers.backends.triton.attention")
    monkeypatch.setattr(attention, "MIN_CHUNKS", 1)
    monkeypatch.setattr(attention, "_waves", lambda *_: 1)
    phi, tensors = feature_map("positive", 7), inputs(37)
    wide = doubles(tensors)
    out, expected = attend(tensors, phi, True), defined(wide, phi, True)
    assert_close(out, expected)
    cotangent = weights_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(out, tensors, cotangent.float()),
        torch.autograd.grad(expected, wide, cotangent.double()),
        strict=True,
    ):
        assert_close(mine, theirs)


def test_heads_and_batches_may_be_laid_out_in_any_order():
    phi = feature_map("positive", 7)
    query, key, value = (torch.randn(2, 5, heads, 5, device=DEVICE) for heads in (4, 2, 2))
    swapped = [x.transpose(1, 2) for x in (query, key, value)]
    out = attend(swapped, phi, True)
    torch.testing.assert_close(out, attend([x.contiguous() for x in swapped], phi, True))
    strided = [x.mT.contiguous().mT for x in swapped]
    torch.testing.assert_close(attend(strided, phi, True), out)
    expected = defined(doubles(swapped), phi, True)
    assert_close(out, expected)


@both_ways
def test_heads_of_sharp_features_have_statistics_of_their_own(is_causal):
    """Or sequences, where statistics are those of the call."""
    phi = sharp_map(2) if is_causal else SharpFeatures(5, 7, num_heads=2, statistics="call")
    phi = phi.to(DEVICE)
    tensors = [torch.randn(2, heads, 19, 5, device=DEVICE) for heads in (4, 2, 2)]
    tensors = [x.requires_grad_() for x in tensors]
    wide = doubles(tensors)
    out, expected = attend(tensors, phi, is_causal), defined(wide, phi, is_causal)
    assert_close(out, expected)
    cotangent = weights_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(out, tensors, cotangent.float()),
        torch.autograd.grad(expected, wide, cotangent.double()),
        strict=True,
    ):
        assert_close(mine, theirs)


def test_maps_without_omega_are_served():
    phi, tensors = feature_map("elu+1 without omega"), inputs(11)
    assert_close(attend(tensors, phi, True), defined(doubles(tensors), phi, True))


@pytest.mark.slow
def test_a_compiled_call_is_one_graph(fresh_python):
    # In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
    fresh_python("""
import torch
from performers import SharpFeatures, SoftmaxFeatures, favor_attention

device = "cuda" if torch.cuda.is_available() else "cpu"
query, key, value = torch.randn(3, 1, 1, 11, 5, device=device).unbind()
sharp = SharpFeatures(5, 7, num_heads=1).to(device)
sharp.calibrate(query, key)
query.requires_grad_()
for phi in (SoftmaxFeatures(5, 7).to(device), sharp):
    def attend(query, phi=phi):
        return favor_attention(query, key, value, phi, True, backend="triton")

    expected = attend(query)
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    (true,) = torch.autograd.grad(expected.square().sum(), query)
    torch.testing.assert_close(gradient, true)
""")


@pytest.mark.parametrize("near", [{}, {"window_size": 2}])
def test_forward_mode_and_transforms_are_refused(near):
    phi, (query, key, value) = feature_map("positive", 7), [x.detach() for x in inputs(5)]

    def total(query):
        out = favor_attention(query, key, value, phi, enable_gqa=True, backend="triton", **near)
        return out.sum()

    with pytest.raises(ValueError, match=r'no rule for torch.func.*"chunked", which serves every'):
        torch.func.jvp(total, (query,), (query,))


def test_second_derivatives_are_refused():
    phi, tensors = feature_map("positive", 7), inputs(5)
    (gradient,) = torch.autograd.grad(
        attend(tensors, phi, False).square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match=r'first derivative only.*backend="chunked"'):
        gradient.sum().backward()


def with_learned_omega() -> SoftmaxFeatures:
    phi = SoftmaxFeatures(5, 7).to(DEVICE)
    phi.omega = phi.omega.clone().requires_grad_()
    return phi


REFUSALS = [
    *((functools.partial(feature_map, name, 7), "is none of these") for name in REFUSED),
    (lambda: KernelFeatures(5, 7, torch.relu, projection=None), "and KernelFeatures is none of"),
    (with_learned_omega, "it has no gradient of omega"),
]


@pytest.mark.parametrize(("build", "reason"), REFUSALS)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(build, reason):
    with pytest.raises(ValueError, match=f'^backend="triton" cannot serve this call:.*{reason}'):
        attend(inputs(5), build().to(DEVICE), True)


def test_what_is_refused_is_what_the_error_does_not_offer():
    kinds = {name.split()[0]: name in MAPS for name in FEATURE_MAPS}
    assert {kind for kind, is_served in kinds.items() if is_served} == {
        kind for kind in kinds if re.search(rf"\b{re.escape(kind)}\b", maps.SUPPORTED)
    }


def test_shapes_and_dtypes_beyond_the_limit_are_refused_with_the_limit():
    tensors = [torch.randn(1, 1, 3, 257, device=DEVICE)] * 3
    with pytest.raises(ValueError, match=r'head dims up to 256, not 257.*"chunked", which serves'):
        attend(tensors, SoftmaxFeatures(257, 7).to(DEVICE), True)
    many = [torch.randn(65536, 1, 1, 5, device=DEVICE)] * 3
    with pytest.raises(ValueError, match="up to 65535 heads of all sequences together, not 65536"):
        attend(many, feature_map("positive"), True)
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, not torch\.float64"):
        attend(doubles(inputs(5)), feature_map("positive"), True)
    with pytest.raises(ValueError, match="at least one query, one key"):
        attend(inputs(0), feature_map("positive"), True)


@both_ways
def test_the_kernels_are_chosen_on_a_gpu_of_a_proven_kind_and_there_alone(is_causal):
    query, key, value = inputs(5)
    proven = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
    for name in FEATURE_MAPS:
        call = Call(
            feature_map(name), 1.0, is_causal, normalize=True, near=None, has_state=False,
            dtype=torch.float32,
        )  # fmt: skip
        chosen = choose_backend(None, call, query, key, value)
        assert (chosen == "triton") == (proven and name in MAPS)


@pytest.mark.parametrize(
    ("blocked", "reason"),
    [(["triton"], "pip install 'performers[triton]'"), ([], "it needs a GPU")],
)
@without_gpu
def test_without_triton_or_a_gpu_the_error_says_what_to_do(fresh_python, blocked, reason):
    code = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import torch, performers
x = torch.randn(1, 1, 3, 4)
try:
    performers.favor_attention(x, x, x, performers.SoftmaxFeatures(4), backend="triton")
except ValueError as error:
    print(error)
performers.favor_attention(x, x, x, performers.SoftmaxFeatures(4))
"""
    assert reason in fresh_python(code, blocked=blocked)


@pytest.mark.parametrize("name", ["positive", "relu", "elu+1"])
def test_nan_in_a_query_or_a_key_reaches_every_row_that_meets_it(name):
    query, key, value = (x.detach() for x in inputs())
    query[:, :, 3, 2] = key[:, :, 5, 2] = torch.nan
    out = attend([query, key, value], feature_map(name), True)
    assert out[:, :, 3].isnan().all()
    assert out[:, :, 5:].isnan().all()
