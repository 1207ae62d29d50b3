"""Near fields by the Triton kernels are those of the definition, on a GPU or in the interpreter."""

import itertools

import pytest
import torch
from torch import Tensor

from performers import KernelFeatures, LinearState, SharpFeatures, SoftmaxFeatures, favor_attention

config = pytest.importorskip("performers.backends.triton.config")
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.usefixtures("small_tiles", "poisoned_memory")
both_ways = pytest.mark.parametrize("is_causal", [False, True])

# Lengths and fields: blocks of less than a tile of 16, of more than one, and one block of all.
FIELDS = {
    "sinks": (22, {"window_size": 4, "num_sinks": 2}),
    "blocks of two tiles": (40, {"window_size": 19}),
    "one block": (21, {"window_size": 40, "num_sinks": 1}),
    "nothing far": (22, {"window_size": 5, "num_sinks": 3, "far": False}),
}


def sharp_map(heads: int = 1) -> SharpFeatures:
    """Sharp features that have learned something, for each key head something else."""
    phi = SharpFeatures(5, 19, num_heads=heads)
    query, key = (torch.randn(1, heads, 50, 5) for _ in range(2))
    phi.calibrate(query * 0.7 + 0.4, key * torch.tensor([1.0, 3.0, 1.0, 0.2, 1.0]) * 0.5)
    return phi.to(DEVICE)


def inputs(
    length: int, dtype: torch.dtype = torch.float32, factor: float = 1.0, heads: int = 1
) -> list[Tensor]:
    """One sequence, two query heads to each key head, with gradients to come."""
    query = torch.randn(1, 2 * heads, length, 5) * factor
    key = torch.randn(1, heads, length, 5) * factor
    tensors = (query, key, torch.randn(1, heads, length, 3))
    return [x.to(DEVICE, dtype).requires_grad_() for x in tensors]


def holes(length: int) -> Tensor:
    return (torch.arange(length, device=DEVICE) % 5 != 1)[None]


def results(tensors: list[Tensor], phi, is_causal: bool, backend: str, mask=None, **options):
    """The output, and the gradients of its sum with weights, the same in any precision."""
    out = favor_attention(
        *tensors, phi, is_causal, mask, enable_gqa=True, backend=backend, **options
    )
    weights = torch.arange(out.numel(), device=DEVICE).view_as(out).cos().to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weights)]


def assert_as_defined(tensors: list[Tensor], phi, is_causal: bool, relative=1e-5, **options):
    wide = [x.detach().double().requires_grad_() for x in tensors]
    found = results(tensors, phi, is_causal, "triton", **options)
    expected = results(wide, phi, is_causal, "reference", **options)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= relative * theirs.abs().max()


@both_ways
@pytest.mark.parametrize("name", FIELDS)
def test_outputs_and_gradients_are_those_of_the_definition(name, is_causal):
    length, field = FIELDS[name]
    mask = None if "two tiles" in name else holes(length)
    heads = 2 if name == "sinks" else 1
    tensors = inputs(length, heads=heads)
    assert_as_defined(tensors, sharp_map(heads), is_causal, mask=mask, **field)


@both_ways
def test_without_the_normalizer_too(is_causal):
    phi = SoftmaxFeatures(5, 7, "hyperbolic").to(DEVICE)
    assert_as_defined(inputs(19), phi, is_causal, window_size=3, normalize=False)


@pytest.mark.parametrize(("dtype", "is_causal"), [(torch.float16, False), (torch.bfloat16, True)])
def test_half_precision_loses_no_more_than_rounding(dtype, is_causal, monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setitem(config.OPERANDS, dtype, config.OPERANDS[torch.float32])
    phi, tensors = sharp_map(), inputs(19, dtype)
    rounding = torch.finfo(dtype).eps
    assert_as_defined(tensors, phi, is_causal, 4 * rounding, window_size=3, num_sinks=1)


def averages(state: LinearState) -> list[Tensor]:
    """What a state stands for, whatever its frame: the logs of its sums, and averages of values."""
    log_mass = state.log_scale + state.normalizer.log()
    return [log_mass, state.values / state.normalizer.unsqueeze(-1)]


@pytest.mark.parametrize("far", [True, False])
def test_pieces_with_carried_state_equal_the_whole(far):
    """A prefill, one token, more than one; the last state, and gradients through all of them."""
    phi, tensors, mask = sharp_map(), inputs(23), holes(23)
    found = []
    for backend, cuts in (("triton", [0, 14, 15, 23]), ("chunked", [0, 23])):
        outputs, state = [], None
        for start, stop in itertools.pairwise(cuts):
            out, state = favor_attention(
                *(x[:, :, start:stop] for x in tensors), phi, True, mask[:, start:stop],
                enable_gqa=True, backend=backend, window_size=4, num_sinks=2, far=far,
                initial_state=state, return_state=True,
            )  # fmt: skip
            outputs.append(out)
        out = torch.cat(outputs, dim=2)
        outputs = [out, *averages(state)]
        gradients = torch.autograd.grad(sum(x.square().sum() for x in outputs), tensors)
        found.append([*outputs, state.near.key, *gradients])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [3, 9])
def test_the_future_leaves_the_past_bit_identical(position):
    phi, tensors = sharp_map(), [x.detach() for x in inputs(19)]
    changed = [x.clone() for x in tensors]
    for x in changed:
        x[:, :, position:] = 1e4 * torch.randn_like(x[:, :, position:])
    before, after = (
        favor_attention(
            *x, phi, True, enable_gqa=True, window_size=4, num_sinks=2, backend="triton"
        )
        for x in (tensors, changed)
    )
    assert torch.equal(before[:, :, :position], after[:, :, :position])
    assert not torch.equal(before, after)


@both_ways
def test_entries_of_1e4_are_finite_and_their_gradients_too(is_causal):
    tensors = inputs(19, factor=1e4)
    tensors[2] = torch.ones_like(tensors[2]).requires_grad_()
    field = {"window_size": 4, "num_sinks": 2}
    out, *gradients = results(tensors, sharp_map(), is_causal, "triton", holes(19), **field)
    seen = holes(19)[0]
    torch.testing.assert_close(out[:, :, seen], torch.ones_like(out[:, :, seen]))
    assert out[:, :, ~seen].eq(0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_a_near_field_alone_needs_no_features_of_its_own():
    phi = KernelFeatures(5, 7, "exp").to(DEVICE)
    assert_as_defined(inputs(11), phi, True, window_size=3, far=False)
